"""Losses and the one training loop."""
