"""A model's tensors under the names of its files and under those of its modules, and the way between the two."""
