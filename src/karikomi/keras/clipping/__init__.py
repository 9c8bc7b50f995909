"""Gradient clipping around a gradient tape."""
