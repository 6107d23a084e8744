"""One file for each kind of backbone; `base` says what a backbone is."""
