# Everything a fresh machine needs is git, make and Python >= 3.11: `make plan` and `make test` set up the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests run in so many processes.
JOBS ?= 2
# `make fuzz` plans so many random programs.
PROGRAMS ?= 2000

export JAX_PLATFORMS ?= cpu

.PHONY: help plan test test-slow test-fuzz test-targets test-browser browser lint format bench bench-quick bench-targets fuzz nightly clean

help:
	@echo "make plan    plan GPT-2 small from shapes and print the chosen checkpoint set"
	@echo "make test    run the tests"
	@echo "make test-slow  run the long ones too: real sizes, every budget"
	@echo "make test-fuzz  a hundred random programs"
	@echo "make test-targets  install the TPU's and the GPU's compilers (no driver, no CUDA libraries), run their tests"
	@echo "make test-browser  look at pages in a headless Chromium; make browser installs one on Debian and Ubuntu"
	@echo "make lint    ruff, pyright, the import contract"
	@echo "make bench   the benchmarks, as tables"
	@echo "make bench-quick  plans against hand-written policies on three tiny models"
	@echo "make fuzz    plan PROGRAMS=2000 random programs and compare them; goes on where it stopped"
	@echo "make nightly the long checks, or PART=name of them; goes on where it stopped"
	@echo "make bench-targets  GPT-2 small planned for an H100 and a TPU v5e"

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

plan: $(STAMP)
	$(BIN)/jaxckpt plan examples.gpt2:loss --budget 4GB

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not targets and not browser'

test-fuzz: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'slow or not slow' tests/test_fuzz.py

# The compilers go into an environment of their own: those who have them pay a second at every start of JAX.
TARGETS_VENV ?= .venv-targets
TARGETS_BIN := $(TARGETS_VENV)/bin
TARGETS_STAMP := $(TARGETS_VENV)/.installed

$(TARGETS_STAMP): pyproject.toml
	$(PYTHON) -m venv $(TARGETS_VENV)
	$(TARGETS_BIN)/python -m pip install --quiet --upgrade pip
	$(TARGETS_BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
	for chip in h100 v5e; do \
	  $(TARGETS_BIN)/jaxckpt targets --install $$chip && continue; \
	  echo "the compiler for $$chip could not be installed: its tests are skipped"; rm -f $@; \
	done

# XProf's memory viewer, for `make nightly PART=memory-xprof-cpu`.
.venv-xprof/.installed:
	$(PYTHON) -m venv .venv-xprof
	.venv-xprof/bin/python -m pip install --quiet xprof
	touch $@

test-targets: $(TARGETS_STAMP)
	$(TARGETS_BIN)/python -m pytest -n $(JOBS) --dist worksteal -m targets -rs

# Playwright comes with no browser: the tests take the Chromium that is here, and say how to get one where there is none.
BROWSER_STAMP := $(VENV)/.browser

$(BROWSER_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[dev,browser]'
	touch $@

test-browser: $(BROWSER_STAMP)
	$(BIN)/python -m pytest -m browser tests/test_browser.py

browser:
	@for name in chromium-headless-shell chromium chromium-browser google-chrome; do \
	  command -v $$name && exit 0; \
	done; \
	apt-get update && apt-get install --yes --no-install-recommends chromium-headless-shell

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/solvers.py
	$(BIN)/python benchmarks/fidelity.py

bench-quick: $(STAMP)
	$(BIN)/python benchmarks/dominance.py --quick --jobs 2

bench-targets: $(TARGETS_STAMP)
	$(TARGETS_BIN)/python benchmarks/targets.py

fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz.run --programs $(PROGRAMS) --jobs $(JOBS)

nightly: $(STAMP)
	$(BIN)/python benchmarks/nightly.py $(PART)

clean:
	rm -rf $(VENV) $(TARGETS_VENV) .venv-xprof .pytest_cache .ruff_cache .hypothesis
