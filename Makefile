# Daily commands. Each sets up .venv with the versions of constraints.txt first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: demo test test-all lint bench bench-solvers clean

.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(PIP) --editable '.[demo]'
	touch $@

.venv/dev: .venv/torch pyproject.toml
	$(PIP) --editable '.[dev,bench]'
	$(BIN)/python -m bench.movie_reviews
	touch $@

demo: .venv/demo
	$(BIN)/python -m bench.demo

test: .venv/dev
	$(BIN)/python -m pytest

test-all: .venv/dev
	$(BIN)/python -m bench.smollm2
	$(BIN)/python -m pytest -m "slow or not slow"

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/dev
	$(BIN)/python -m pytest bench --benchmark-only

bench-solvers: .venv/dev
	$(BIN)/python -m bench.solvers

clean:
	rm -rf .venv build demo-output
