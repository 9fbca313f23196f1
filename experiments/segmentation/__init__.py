"""Semantic segmentation: a class for every pixel, from a multiscale equilibrium."""
