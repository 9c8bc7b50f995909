"""Optimizers that clip and mask."""
