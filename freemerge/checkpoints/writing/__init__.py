"""Writing tensors: atomic drafts, shards, checksums."""
