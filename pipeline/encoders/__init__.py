"""Frozen speech encoders: audio samples to frames."""
