# make train   set everything up and run the main job
# make test    set everything up and run the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests run in so many processes, one thread each: kernels are interpreted, which takes one core however many there are.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --benchmark-disable

.PHONY: setup train test test-all test-faults test-releases lint format docs bench reproduce-small pretrain-tiny \
	pretrain-tiny-lact pretrain-tiny-hybrid clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,plots,dev]'
	touch $@

train: setup
	$(BIN)/python -m refine.train --overwrite_output_dir

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST) --ignore tests/faults

# Random kills, placed faults, random edits of settings; the figures go to docs/reliability.md. REFINE_FAULTS=0.1: a tenth.
test-faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -q -s --benchmark-disable

# The suite in throw-away environments: releases, threads, instruction sets and seeds; two hours on two cores.
test-releases:
	$(PYTHON) tests/releases.py

# The pages and the API reference as a site, site/index.html; a link that leads nowhere is an error.
docs: setup
	$(BIN)/python -m mkdocs build --strict

bench: setup
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

# SFT against REFINE from the tiny model, five seeds: at most an hour on two cores; goes on where it stopped.
reproduce-small: setup
	$(BIN)/python -m benchmarks.reproduce_small --record

# The recipe of the model inside the package: tokenizer, two stages of training (under an hour on one core), float16
# weights, report.
pretrain-tiny: setup
	$(BIN)/python -m refine.data.tokenizer --output_dir runs/tiny-tokenizer
	$(BIN)/python -m refine.train --config pretrain_tiny_1 --overwrite_output_dir
	$(BIN)/python -m refine.train --config pretrain_tiny_2 --overwrite_output_dir
	$(BIN)/python -m refine.models.export --model runs/pretrain-tiny-2/final --output_dir runs/tiny-delta-net
	$(BIN)/python -m refine.eval --model runs/tiny-delta-net
	$(BIN)/python -m refine.eval --model runs/tiny-delta-net --tasks niah_single_1 niah_single_2 niah_multikey_1 --lengths 1024 2048 --samples 200

# A LaCT or a hybrid of the same size: about 20 minutes of a free core.
pretrain-tiny-lact pretrain-tiny-hybrid: pretrain-tiny-%: setup
	$(BIN)/python -m refine.data.tokenizer --output_dir runs/tiny-tokenizer
	$(BIN)/python -m refine.train --config pretrain_tiny_$* --overwrite_output_dir
	$(BIN)/python -m refine.eval --model runs/pretrain-tiny-$*/final --tasks niah_single_1 niah_single_2 niah_multikey_1 \
		--lengths 512 1024 --samples 100

clean:
	rm -rf $(VENV) runs .benchmarks .pytest_cache .ruff_cache build dist site *.egg-info
