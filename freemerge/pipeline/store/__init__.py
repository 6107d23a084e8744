"""The files of a run: each stage's folder, the keys of its contents, the lock, what would be replaced."""
