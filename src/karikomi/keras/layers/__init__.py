"""Unit axes and prunable weights of layer types."""
