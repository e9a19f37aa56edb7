"""Tests that take too long for every run: `make gpu-check` sets GSF_GPU_CHECK=1 and runs this folder."""

import os

collect_ignore_glob = [] if os.environ.get("GSF_GPU_CHECK") == "1" else ["test_*.py"]
