"""One folder an operation: `reference.py` is the truth, in plain PyTorch; `cpu.py` is there where
PyTorch has a faster way on a CPU; `__init__.py` chooses by device and dtype.
"""
