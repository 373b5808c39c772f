"""Data of a run: its caches, the rows to train on, the held-out rows, and batches."""
