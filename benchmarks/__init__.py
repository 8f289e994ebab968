"""Benchmarks: `python -m benchmarks cpu | gpu | sparse | approximate | host | demo`.

Every timed call is checked first.
"""
