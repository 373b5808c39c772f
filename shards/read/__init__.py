"""Reading of committed features from memory-mapped shards."""
