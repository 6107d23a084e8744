"""How a model computes with experts."""
