"""Quantized weights in Keras models."""
