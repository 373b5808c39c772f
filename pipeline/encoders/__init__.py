"""Frozen speech encoders: audio samples in, feature frames out."""
