"""Statistics of data that some methods merge by, measured on a fine-tuned model while it computes."""
