# RLFSEG_PYTHON=/path/to/python uses an environment that is there already; otherwise .venv is made once and kept up to date.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
ifdef RLFSEG_PYTHON
PYTHON := $(RLFSEG_PYTHON)
INSTALLED :=
else
PYTHON := $(CURDIR)/$(VENV)/bin/python
INSTALLED := $(VENV)/.installed
endif
# The tools of that environment come first, `rlfseg` and `ray` among them.
export PATH := $(patsubst %/,%,$(dir $(PYTHON))):$(PATH)

PACKAGES := $(patsubst %/,%,$(sort $(dir $(wildcard rlfseg/*.py jobs/*.py serve/*.py))))
PYDOCLINT := .cache/pydoclint
CHECKS := lint format-check types imports docstrings spelling yaml

.PHONY: help venv quickstart check $(CHECKS) format test test-all faults wheel clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

venv: $(INSTALLED) ## Make .venv and install everything (about 4 minutes and 7 GB, once)

# torch and torchvision come first and together: segment-anything wants torchvision, and the two must be of one build.
# Should .venv be no environment after all, pip refuses rather than write into the system's Python.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -f $(VENV)/pyvenv.cfg || python3.11 -m venv $(VENV)
	export PIP_REQUIRE_VIRTUALENV=1
	grep -E '^(torch|torchvision)==' constraints.txt | xargs $(VENV)/bin/python -m pip install --quiet
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: venv ## The whole pipeline on drawn scenes, on a laptop's CPU
	bash scripts/quickstart.sh

check: $(CHECKS) ## Everything but the tests: lint, format, types, imports, docstrings, spelling, YAML (`make -k check` shows all)

lint: venv
	$(PYTHON) -m ruff check .

format-check: venv
	$(PYTHON) -m ruff format --check .

types: venv
	$(PYTHON) -m mypy $(PACKAGES)

# import-linter has no `python -m`
imports: venv
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' --no-logo --cache-dir .cache/imports

docstrings: venv $(PYDOCLINT)/.installed
	PYTHONPATH=$(PYDOCLINT) $(PYTHON) -c 'from pydoclint.main import main; main()' --quiet $(PACKAGES)

# Apart from the rest: it depends on a fork of docstring_parser that has the same module name.
$(PYDOCLINT)/.installed: constraints.txt | $(INSTALLED)
	rm -rf $(PYDOCLINT)
	$(PYTHON) -m pip install --quiet -c constraints.txt --target $(PYDOCLINT) pydoclint
	touch $@

spelling: venv
	$(PYTHON) -m codespell_lib

yaml: venv
	$(PYTHON) -m yamllint --strict .

format: venv ## Let ruff format and mend what it can
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

test: venv ## The tests that take minutes: on the CPU, then those of a GPU where there is one
	$(PYTHON) -m pytest -m 'not slow and not drill and not gpu'
	$(PYTHON) -m pytest -m gpu tests/test_gpu.py

test-all: venv ## All tests: slow ones, drills and, where there is a GPU, those for it; results go to docs/test-all.md
	failed=
	$(PYTHON) -m pytest -m 'not gpu' --junit-xml=runs/test-all.xml || failed=1
	$(PYTHON) -m pytest -m gpu --junit-xml=runs/test-gpu.xml tests/test_gpu.py || failed=1
	PYTHONPATH=. $(PYTHON) scripts/test_report.py runs/test-all.xml runs/test-gpu.xml docs/test-all.md
	test -z "$$failed"

faults: venv ## The known faults that tests stand for
	$(PYTHON) -m pytest --collect-only -q -m fault

wheel: venv ## Build dist/*.whl
	$(PYTHON) -m build --wheel --no-isolation

clean: ## Remove caches and what was built; .venv and runs stay
	rm -rf build dist .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
