"""Masks on the parameters of a module."""
