"""Speed and memory: ratios of what ran side by side in one run, on a machine that the results name."""
