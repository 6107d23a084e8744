"""One file for each merging method; `base` says what a method is."""
