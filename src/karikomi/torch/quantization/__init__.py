"""Quantized weights in modules."""
