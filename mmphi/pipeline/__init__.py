"""What a stage is, the key its result is found by, and building what is missing; knows no stage by name."""
