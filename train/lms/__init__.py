"""Language models that take soft tokens as input."""
