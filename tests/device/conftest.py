"""Tests that need a GPU: `make gpu` runs this folder.  Without one nothing is collected."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
