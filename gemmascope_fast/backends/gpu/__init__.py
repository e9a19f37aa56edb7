"""Launchers of the Triton and CUDA kernels. Importing them touches no GPU and compiles nothing."""
