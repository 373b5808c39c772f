"""Linear probes: what each layer of an encoder carries, told from caches alone."""
