"""Masks on the variables of a model."""
