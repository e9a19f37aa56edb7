"""Importing the package touches no GPU, compiles nothing and leaves heavy libraries alone."""

import subprocess
import sys

PROBE = """
import socket, subprocess, sys
def refuse(*_, **__): raise AssertionError("import must not start a process or open a connection")
subprocess.Popen.__init__ = refuse
socket.socket.connect = refuse
import torch
before = set(sys.modules)
import gemmascope_fast
heavy = {"transformers", "gguf", "rich", "jinja2", "huggingface_hub"}
assert not heavy & (set(sys.modules) - before), heavy & set(sys.modules)
assert not torch.cuda.is_initialized()
"""


def test_import_is_lean():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
