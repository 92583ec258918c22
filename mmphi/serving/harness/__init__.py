"""Published benchmarks, run by harnesses that are installed beside mmphi."""
