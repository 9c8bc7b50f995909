"""Clipping, bounding and pruning attached to an optimizer."""
