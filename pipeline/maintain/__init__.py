"""Maintenance of existing caches: ``check`` compares with the encoder, ``repair`` re-extracts corrupt shards."""
