"""Launchers of the Triton and CUDA kernels; importing touches no GPU and compiles nothing."""
