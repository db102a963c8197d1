"""Number formats, quantizers and packed checkpoints."""
