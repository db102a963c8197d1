"""Losses and the one training loop.  Nothing here yet."""
