"""Benchmarks: `python -m benchmarks cpu | gpu | demo`. Every timed call is checked first."""
