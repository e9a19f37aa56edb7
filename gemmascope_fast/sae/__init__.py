"""Coders (JumpReLU, top-k, transcoders, cross-layer), where their rows live, and the screen; no files, no models."""
