"""For those who build this package: benchmarks, roof, profile, test inputs, GPU checks; nothing that a user needs."""
