"""The training loop: steps, losses, early stopping and checkpointed state."""
