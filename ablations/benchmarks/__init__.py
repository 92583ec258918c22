"""Benchmarks against other ways to run many trainings."""
