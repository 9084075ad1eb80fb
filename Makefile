# Everything a fresh machine needs is git, make and Python >= 3.11: `make plan` and `make test` set up the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export JAX_PLATFORMS ?= cpu

.PHONY: help plan test test-slow lint format bench clean

help:
	@echo "make plan    plan GPT-2 small from shapes and print the chosen checkpoint set"
	@echo "make test    run the tests"
	@echo "make test-slow  run the long ones too: real sizes, every budget"
	@echo "make lint    ruff, pyright"
	@echo "make bench   the benchmarks, as tables"

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

plan: $(STAMP)
	$(BIN)/jaxckpt plan examples.gpt2:loss --budget 4GB

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m 'not targets'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/solvers.py
	$(BIN)/python benchmarks/fidelity.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
