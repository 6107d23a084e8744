"""Which tensor of a fine-tuned model belongs to which of the base."""
