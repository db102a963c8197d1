"""How fast the runtime is on this machine: one request, many, and beside what others would use."""
