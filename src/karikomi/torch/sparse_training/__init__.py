"""Pruning, regrowth, rewinding and penalties during training."""
