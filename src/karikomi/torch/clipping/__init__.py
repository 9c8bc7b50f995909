"""Gradient clipping on the host and on a device."""
