# Every target makes the environment it needs; a bare Debian/Ubuntu machine with Python >= 3.10 and make is enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test bench lint format types clean

setup: $(STAMP)

# constraints.txt holds the versions that CI tests with, on Python 3.11. Elsewhere the ranges in pyproject.toml decide.
CONSTRAINTS := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")')

$(STAMP): pyproject.toml constraints.txt
	sh scripts/bootstrap.sh $(PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(CONSTRAINTS) --editable ".[dev]"
	# The simulator brings opencv-python, whose files (and need of a display's libraries) go where the headless ones were.
	$(BIN)/python -m pip install $(CONSTRAINTS) --quiet --force-reinstall --no-deps opencv-python-headless
	touch $@

demo: setup
	$(BIN)/python scripts/demo.py

# Two workers, one thread each: two cores stay busy and no test times anything.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The installed package vat_fast is put together from three folders; show the type checker that tree.
types: setup
	rm -rf build/types && mkdir -p build/types/vat_fast
	ln -s $(CURDIR)/vat_fast/* $(CURDIR)/kernels $(CURDIR)/train build/types/vat_fast/
	cd build/types && $(BIN)/mypy --config-file ../../pyproject.toml vat_fast

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
