"""Norms, scaling and precision of tensors."""
