# make demo    plan a fleet and write its report          make test   everything that must hold
# make lint    the static checks alone                    make bench  how fast the estimator is
# make docs    regenerate the pages printed by the code   make clean  forget what was built
#
# PYTHON       interpreter the environment is made from (3.11 to 3.13)
# VENV         where the environment is kept
# TORCH        which PyTorch the tests use; any version from 2.2 on will do
# TORCH_INDEX  package index for PyTorch alone, for example its index of CPU builds

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO := out/demo

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	$(BIN)/perfmodel plan examples/azure-chat-70b.yaml --out $(DEMO)
	@find $(DEMO) -name '*.html' -exec echo 'Open the report: {}' ';'

# The static checks are tests too (tests/packaging/test_static.py), so one command covers everything.
# A file's tests stay together, on as many processors as there are.
test: $(VENV)/.installed-all
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.installed-all
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/fidelity.py

bench: $(VENV)/.installed-all
	$(BIN)/python -m pytest tests/bench -o python_files='bench_*.py' -s

clean:
	rm -rf $(VENV) build dist out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed in place, so only a change of what is required installs again.
$(VENV)/.installed: pyproject.toml hatch_build.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

# PyTorch first and alone: from its own index where one is named.
$(VENV)/.installed-all: $(VENV)/.installed
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP) --editable '.[dev,test,torch]'
	@touch $@
