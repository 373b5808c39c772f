"""Audio decoded ahead of the encoder."""
