"""Rewrites of a network that keep what it computes, and make it easier to quantize."""
