"""Storage formats of tensors, one module each."""
