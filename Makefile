# `make demo` and `make test` set themselves up: a virtual environment in .venv, with the package
# and everything it is tested with at the versions in constraints.txt.

PYTHON ?= python3
VENV := .venv
# Quoted, and tools run as modules: paths may hold spaces, and an environment may be moved.
RUN := "$(VENV)/bin/python"
OUT ?= runs/demo
# The demo's source model is trained once; a later run continues or uses what is there.
RESUME = $(if $(wildcard $(OUT)/training/last.pt),--resume)
# One test process a core, each with one thread: the tests' tensors are small.
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses $(WORKERS) --dist worksteal

empty :=
space := $(empty) $(empty)
INSTALLED := $(subst $(space),\$(space),$(VENV))/.installed

.PHONY: demo demo-aneurysm demo-prostate test test-simulated lint coverage docs gpu gpu-wheels clean

demo: $(INSTALLED)
	$(RUN) -m examples.fundus compare --statistics mixed:0.8 --lr 1e-3 --out "$(OUT)" $(RESUME)

demo-prostate: OUT = runs/demo-prostate
demo-prostate: $(INSTALLED)
	$(RUN) -m examples.prostate compare --size 32 --width 8 --iterations 200 --every 25 --labels 24 \
		--test-images 36 --learning-rate 0.1 --out "$(OUT)"

# GS-EMA beside a plain teacher and none, on a centre held out; a later run continues or uses what is
# there.
demo-aneurysm: $(INSTALLED)
	$(RUN) -m examples.aneurysm compare --methods none,ema,gsema,bacl \
		--out "$(OUT)-aneurysm" $(if $(wildcard $(OUT)-aneurysm/training),--resume)

test: $(INSTALLED)
	$(PYTEST)

# The tests for CUDA devices, on an accelerator that is simulated; needs a C++ compiler.
test-simulated: $(INSTALLED)
	GRADKIT_TEST_DEVICE=simulated OMP_NUM_THREADS=1 $(RUN) -m pytest tests/cuda

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

coverage: $(INSTALLED)
	$(PYTEST) --cov --cov-report=term-missing --cov-fail-under=95

docs: $(INSTALLED)
	$(RUN) -m pip install --quiet --constraint constraints.txt '.[docs]'
	$(RUN) -m mkdocs build --strict --site-dir build/site

# On a machine with a CUDA device, whose own python3 has torch: nothing is installed there, but for
# the wheels in the folder WHEELS, and these into a temporary folder. See benchmarks/gpu.sh.
gpu:
	PYTHON="$(PYTHON)" bash benchmarks/gpu.sh

# Here, for a machine that reaches no package index: what benchmarks/gpu.txt names, into WHEELS.
WHEELS ?=
gpu-wheels:
	"$(PYTHON)" -m pip download --quiet --no-deps --only-binary=:all: --constraint constraints.txt \
		--requirement benchmarks/gpu.txt --dest "$(or $(WHEELS),runs/wheels)"

$(INSTALLED): pyproject.toml constraints.txt
	"$(PYTHON)" -m venv "$(VENV)"
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[examples,dev]'
	touch "$@"

clean:
	rm -rf "$(VENV)" runs build dist *.egg-info
