"""Benchmarks that compare mmphi with other implementations."""
