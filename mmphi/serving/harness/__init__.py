"""Published benchmarks, run by separately installed harnesses."""
