"""Reconstruction of weights on host arrays: least squares, OBC, SparseGPT."""
