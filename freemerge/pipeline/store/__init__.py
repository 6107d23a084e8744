"""The files of a run: stage folders and their keys, the lock, and the plan of what would be replaced."""
