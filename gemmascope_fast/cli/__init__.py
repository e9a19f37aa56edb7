"""The command gemmascope-fast: arguments and printing, nothing else."""
