# `make demo` and `make test` set themselves up: a virtual environment in .venv, with the package
# and everything it is tested with at the versions in constraints.txt.

PYTHON ?= python3
VENV := .venv
# Quoted, and tools run as modules: paths may hold spaces, and an environment may be moved.
RUN := "$(VENV)/bin/python"
OUT ?= runs/demo
# One test process a core, each with one thread: the tests' tensors are small.
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses $(WORKERS) --dist worksteal

empty :=
space := $(empty) $(empty)
INSTALLED := $(subst $(space),\$(space),$(VENV))/.installed

.PHONY: demo test lint coverage docs clean

demo: $(INSTALLED)
	$(RUN) -m examples.fundus compare --statistics mixed:0.8 --lr 1e-3 --out "$(OUT)"

test: $(INSTALLED)
	$(PYTEST)

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

coverage: $(INSTALLED)
	$(PYTEST) --cov --cov-report=term-missing --cov-fail-under=95

docs: $(INSTALLED)
	$(RUN) -m pip install --quiet --constraint constraints.txt '.[docs]'
	$(RUN) -m mkdocs build --strict --site-dir build/site

$(INSTALLED): pyproject.toml constraints.txt
	"$(PYTHON)" -m venv "$(VENV)"
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[examples,dev]'
	touch "$@"

clean:
	rm -rf "$(VENV)" runs build dist *.egg-info
