"""Speculative decoding: cheap proposals of the next tokens, which the model verifies together."""
