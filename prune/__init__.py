"""Smaller architectures: depth and width (pruning).  Attention to come."""
