"""The training loop: a step, its losses, its state."""
