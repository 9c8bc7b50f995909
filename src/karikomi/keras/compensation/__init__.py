"""Compensation of removed units in Keras: what is left is re-fitted to the outputs of the dense model."""
