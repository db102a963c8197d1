# `make demo` and `make test` are all a newcomer needs; each makes .venv if it is missing.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
FOLDERS := $(shell sed -n 's/^"compress[.][a-z]*" = "\(.*\)"/\1/p' pyproject.toml)
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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# pyright finds the sub-packages where they are laid out as they are imported: links do that.
types: install
	rm -rf build/types
	mkdir -p build/types/compress
	@cd build/types/compress && ln -s $(addprefix ../../../,$(wildcard compress/*) $(FOLDERS)) .
	$(BIN)/pyright --pythonpath $(BIN)/python

demo: install
	PATH="$(abspath $(BIN)):$$PATH" sh recipes/demo.sh

# On a machine with a GPU: tests, parity and tables, in minutes; call it again to go on.
gpu-check: install
	$(BIN)/python benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) build demo *.egg-info
