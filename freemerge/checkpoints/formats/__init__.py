"""One file for each format in which tensors are stored."""
