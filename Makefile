# `make demo` and `make test` set themselves up: a virtual environment in .venv, with the package
# and everything it is tested with at the versions in constraints.txt.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OUT ?= runs/demo

.PHONY: demo test lint coverage clean

demo: $(VENV)/.installed
	$(RUN) -m examples.fundus compare --out $(OUT)

test: $(VENV)/.installed
	$(RUN) -m pytest

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

coverage: $(VENV)/.installed
	$(RUN) -m pytest --cov --cov-report=term-missing --cov-fail-under=95

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[examples,dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
