"""Matching the tensors of fine-tuned models to those of the base."""
