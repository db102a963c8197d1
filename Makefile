# `make demo` and `make test` are all a newcomer needs; each makes .venv if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: install test lint types demo gpu-check clean

install: $(VENV)/installed

# torch first and by itself: pinned like this, an index that carries a CPU build gives that one.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,demo]'
	touch $@

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# pyright follows the folder mapping only where it is laid out as files: a strict editable install.
types: install
	$(BIN)/python -m pip install --quiet --no-deps -e . --config-settings editable_mode=strict
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-deps -e .

demo: install
	PATH="$(abspath $(BIN)):$$PATH" sh recipes/demo.sh

# On a machine with a GPU: tests, parity and tables, in minutes; call it again to go on.
gpu-check: install
	$(BIN)/python benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) build demo *.egg-info
