"""Least-squares reconstruction of layers from calibration data."""
