"""What each bit width of nested codes costs, for a model and for an SAE."""
