"""The HTTP server: OpenAI's API on `compress.runtime`, for `compress serve`."""
