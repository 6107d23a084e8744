"""The kinds of experts, one class per file."""
