"""Compensation of removed units: what is left is re-fitted to the outputs of the dense network."""
