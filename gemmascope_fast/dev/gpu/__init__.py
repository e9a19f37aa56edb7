"""GPU kernels checked without a GPU: compiled, gated and modelled; their launchers live in backends/gpu."""
