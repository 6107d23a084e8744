"""The kinds of experts: one class in a file each."""
