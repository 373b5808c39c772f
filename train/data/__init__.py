"""The caches of a run: rows to train on, held-out rows, batches."""
