"""Batches for training: sampling, prefetching and padding."""
