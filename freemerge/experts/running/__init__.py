"""Forward passes of a model with experts."""
