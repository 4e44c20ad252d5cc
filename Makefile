# One command each. `make demo` and `make test` start from nothing; everything else assumes nothing more.
PYTHON ?= python3
VENV ?= .venv
# Installed first and pinned, because a bare range lets pip choose a build of several gigabytes.
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers>=5.17,<6
OLDEST := transformers==5.17.0
PYTEST_ARGS ?=
# Test processes; the tests keep to one thread each.
JOBS ?= auto
BENCH_ARGS ?=
BIN := $(VENV)/bin

# What another transformers cannot change: kernels in the interpreter, statistics, measuring, training, documents, and how
# rows are scheduled, drafted and laid out. Names as pytest's -k takes them.
NO_MODELS := interpreter or test_acceptance.py or test_ahead.py or test_bench.py or test_bench_measure.py or \
	test_bench_statistics.py or test_benchmark.py or test_cost_model.py or test_distill.py or test_docs.py or \
	test_equivalence.py or test_goodness.py or test_gpu_grid.py or test_heads.py or test_infill.py or \
	test_infill_lossless.py or test_layouts.py or test_length.py or test_lossless.py or test_lossy.py or \
	test_matrix.py or test_output_file.py or test_random_streams.py or test_rows.py or test_sampling.py or \
	test_sampling_check.py or test_schedule.py or test_step_graphs.py or test_step_timeline.py or \
	test_step_tuning.py or test_structure.py or test_train_any_subset.py or test_train_heads.py or \
	test_train_look_ahead.py or test_trainer.py

.PHONY: setup demo test test-slow test-oldest check lint types bench clean

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
	PYTHONPATH=$(CURDIR)/.oldest $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -k "not ($(NO_MODELS))" $(PYTEST_ARGS)

.oldest/.installed: pyproject.toml $(VENV)/.installed
	rm -rf .oldest
	$(BIN)/python -m pip install --quiet --target .oldest "$(OLDEST)"
	touch $@

check: lint types test

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/decode.py --device cpu $(BENCH_ARGS)

clean:
	rm -rf .venv .oldest build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
