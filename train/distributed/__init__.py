"""Several processes as one run, and how they end."""
