"""One folder an operation: reference, Triton, CPU, dispatch.  Nothing here yet."""
