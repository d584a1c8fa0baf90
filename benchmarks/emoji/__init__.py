"""Emoji Diffusion: the world that it draws, its training and its evaluation."""
