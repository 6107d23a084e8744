"""One module for each merging method; `base` defines the interface."""
