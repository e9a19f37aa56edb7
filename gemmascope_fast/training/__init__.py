"""Training of JumpReLU SAEs."""
