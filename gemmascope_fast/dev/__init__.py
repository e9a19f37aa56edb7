"""For developers of this package: benchmarks, roof, profile, test inputs, GPU checks."""
