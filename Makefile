# Everyday commands. `make` alone lists them. VENV is made and filled on first use, with the versions in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
RUNTIME := $(VENV)/.installed-runtime
ALL := $(VENV)/.installed-all
SITE := $(VENV)/.installed-docs
LOWEST_VENV ?= .venv-lowest
# Names of dependencies that test-lowest does not hold at their lowest, such as torch where no such build can be had.
LOWEST_EXCEPT ?=

.DEFAULT_GOAL := help
.PHONY: help demo demo-checkpoint test test-slow test-lowest lint docs bench bench-gpu

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(RUNTIME)  ## train a small diffusion language model with RL on the CPU and show what it gained
	$(PY) examples/demo.py

demo-checkpoint: $(RUNTIME)  ## rebuild the checkpoint that the demo starts from
	$(PY) examples/make_demo_checkpoint.py

test: $(ALL)  ## run the tests, but for the slow ones and those that need a GPU
	$(PY) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

test-slow: $(ALL)  ## run the slow tests
	$(PY) -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

test-lowest: $(LOWEST_VENV)/.installed  ## run the trainer and model tests with the oldest versions that are allowed
	$(LOWEST_VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 8 tests/training tests/models $(PYTEST_ARGS)

lint: $(ALL)  ## check style, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(SITE)  ## build the documentation's site into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

bench: $(RUNTIME)  ## measure what caches save on this machine (ten minutes of one core)
	$(PY) benchmarks/rollout.py

bench-gpu: $(RUNTIME)  ## measure 8B models on a GPU, against what it could do (eight minutes)
	$(PY) benchmarks/gpu.py

# torch comes first and alone: it is the large one, and a pip that resolves everything at once may pick another build of it.
$(RUNTIME): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 11) else "rl4dlm needs Python 3.11 or newer, and $(PYTHON) is " + v + "; name another: make PYTHON=python3.12 ...")'
	@echo "Installing into $(VENV): torch, then the other dependencies (about two minutes on a fast connection)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[plots]'
	@touch $@

$(ALL): $(RUNTIME)
	@echo "Installing into $(VENV): what tests and checks need besides"
	@DS_BUILD_OPS=0 $(PIP) install --quiet --constraint constraints.txt --editable '.[test,deepspeed]'
	@touch $@

$(SITE): $(RUNTIME)
	@echo "Installing into $(VENV): what the documentation's site needs besides"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

# Constraints are made from the bounds themselves, so that an install that fails shows a bound that cannot be met.
$(LOWEST_VENV)/.installed: pyproject.toml tests/lowest_versions.py
	@echo "Installing into $(LOWEST_VENV): the oldest versions that pyproject.toml allows"
	@$(PYTHON) -m venv $(LOWEST_VENV)
	@$(LOWEST_VENV)/bin/python tests/lowest_versions.py $(LOWEST_EXCEPT) > $(LOWEST_VENV)/lowest.txt
	@$(LOWEST_VENV)/bin/python -m pip install --quiet --constraint $(LOWEST_VENV)/lowest.txt --editable '.[test]'
	@touch $@
