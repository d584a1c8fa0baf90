"""Parts of the experiments on sparse autoencoders."""
