"""How much is pruned at which step of training."""
