"""Penalties that drive weights or units towards zero."""
