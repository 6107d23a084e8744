"""Advice before a merge, from the checkpoints alone: how the task vectors relate, and a method to begin with."""
