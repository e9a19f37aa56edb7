"""The GPU path: launchers of the kernels in kernels/ and csrc/cuda, and what holds them without a GPU.

Importing this package touches no GPU and imports no Triton; the launchers do at the call.
"""
