"""The files of a model's folder beside its weights."""
