"""What `benchmarks/gpu_check.py` does on a GPU: tests, parity, tables; one module a part."""
