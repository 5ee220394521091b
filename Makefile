# Every target sets up .venv by itself, so each works on a bare machine with Python 3.11 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.frazil-installed

.PHONY: help demo test check bench gpu slow clean
.DEFAULT_GOAL := help

help:            ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,models]'
	@touch $@

demo: $(STAMP)   ## simulate particles, refine them, compare with the truth (under 4 minutes on 2 cores)
	rm -rf demo
	$(BIN)/frazil demo --output demo

test: $(STAMP)   ## unit tests, real data and other programs' files where present
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(STAMP)  ## lint, types, layers
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_layers.py

slow: $(STAMP)   ## whole jobs on simulated and real particles
	$(BIN)/python -m pytest -n 2 -m 'slow and not gpu'

gpu: $(STAMP)    ## the op tests and jobs that need a GPU
	$(BIN)/python -m pytest -m gpu

bench: $(STAMP)  ## the same job with RELION (where installed) and with frazil, side by side
	$(BIN)/python bench/against_relion.py

clean:           ## remove what the targets made, .venv too
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache .hypothesis .benchmarks
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
