"""Language models that read soft tokens."""
