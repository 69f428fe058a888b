# Everything a newcomer needs: `make demo`, `make test`. All commands run in .venv, made from pinned versions.
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
OUTPUT ?= runs/demo
BUNDLE ?= weights/tiny
# two files of tests at a time, each with one thread: cores are used, and figures stay comparable
UNIT := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray and not slow and not gpu"
export RAY_AUTH_MODE ?= token
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo test test-unit test-slow lint types serve bench clean

setup: .venv/.done

.venv/.done: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python jobs/pipeline.py --config demo --output $(OUTPUT)

test: setup
	$(UNIT)
	$(BIN)/python -m pytest -m "ray and not slow and not gpu"

test-unit: setup
	$(UNIT)

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

serve: setup
	$(BIN)/python jobs/serve_bundle.py --bundle $(BUNDLE)

bench: setup
	mkdir -p runs
	$(BIN)/python -m benchmarks.bench --bundle $(BUNDLE) --output runs/bench.json

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache
