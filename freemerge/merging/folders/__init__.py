"""The companions of a model's weights: the other files of its folder."""
