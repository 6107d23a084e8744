"""Writing tensors: drafts that appear whole or not at all, shards, checksums."""
