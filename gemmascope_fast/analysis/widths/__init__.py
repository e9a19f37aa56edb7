"""Cost of each bit width of nested codes, for a model and for an SAE."""
