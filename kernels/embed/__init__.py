"""Looking up the embeddings of tokens, some of which a device has drawn and nobody else knows."""
