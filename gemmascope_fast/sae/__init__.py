"""SAE modules (JumpReLU, top-k, transcoders, cross-layer), row storage and the screen. No file formats, no models."""
