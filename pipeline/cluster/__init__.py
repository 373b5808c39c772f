"""An extraction on a Ray cluster."""
