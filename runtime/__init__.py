"""The decode runtime: paged KV cache, scheduler, engine, server."""
