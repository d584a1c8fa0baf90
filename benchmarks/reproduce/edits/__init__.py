"""What `benchmarks.reproduce.editing` edits, judges, chooses and shows."""
