"""Metrics by the benchmarks' own definitions; each gives 0 to 1."""
