"""Experiments and measurements on the packages; not installed."""
