"""Batches for training: which utterances form a batch, in which order, read ahead and padded."""
