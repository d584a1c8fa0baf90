"""What `benchmarks.reproduce.attribution` estimates, sets to 0, judges and shows."""
