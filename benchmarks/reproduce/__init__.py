"""Claims of published papers, tested: what was measured, against which control, and a verdict by a stated rule."""
