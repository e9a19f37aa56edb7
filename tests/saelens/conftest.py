"""Settings for the other libraries that must be made before they are imported."""

import os

import torch

# sparsify decodes with Triton wherever that can be imported, which needs a GPU
if not torch.cuda.is_available():
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
