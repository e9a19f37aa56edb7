"""Tests that need compiled Triton kernels on CPU tensors: tests/test_ptx.py runs them with the plug-in."""

import os

collect_ignore_glob = [] if os.environ.get("GSF_PTX") == "1" else ["test_*.py"]
