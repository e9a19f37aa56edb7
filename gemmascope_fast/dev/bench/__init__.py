"""Benchmarks whose figures can be made again: cases, peers, paired timings, comparison and regression guard."""
