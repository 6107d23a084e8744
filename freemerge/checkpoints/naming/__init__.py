"""Conversion between the tensor names of a model's files and those of its modules."""
