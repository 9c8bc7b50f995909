"""Smaller copies of functional and sequential models, with units really removed."""
