"""Smaller architectures: depth, width, attention.  Nothing here yet."""
