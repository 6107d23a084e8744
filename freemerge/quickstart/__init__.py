"""The demo suite and all that only it needs."""
