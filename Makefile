# One command serves a model; another runs every test. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin

MODEL ?=
WORKERS ?= 2
# MODE=disagg: one worker more that computes the prompts, whose KV cache the others fetch
MODE ?= agg
PORT ?= 8000
OUT ?= vllm
# Engine flags of your own, e.g. FLAGS="--max-model-len 4096"
FLAGS ?=
# How long to break things, and in which order
SECONDS ?= 60
SEED ?= 1

.DEFAULT_GOAL := help
.PHONY: help run install test lint bench chaos fuzz docs clean

help:  ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/'

run:  ## Serve MODEL (a directory or hub id; default: a demo model) with WORKERS workers of OUT on PORT
	@$(PYTHON) scripts/install.py $(if $(filter vllm,$(OUT)),,--no-engine)
	@exec $(BIN)/dynamo run $(MODEL) in=http out=$(OUT) --num-workers $(WORKERS) --http-port $(PORT) \
		$(if $(filter disagg,$(MODE)),--prefill-workers 1) \
		--say "Hello! Who are you?" $(if $(FLAGS),-- $(FLAGS))

install:  ## Make .venv with the dynamo command and all that tests and benchmarks need
	@$(PYTHON) scripts/install.py --dev

lint: install  ## Format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## Everything: lint and all tests, the real engine's included
	$(BIN)/pytest $(PYTEST_ARGS)

bench: install  ## Measure against the peer and write docs/reference/benchmarks.md (about an hour)
	$(BIN)/python scripts/bench.py $(BENCH_ARGS)

chaos: install  ## Break a deployment under load for SECONDS, by SEED, and hold it to its promises (needs root)
	$(BIN)/python -m chaos --seconds $(SECONDS) --seed $(SEED) $(CHAOS_ARGS)

fuzz: install  ## Feed the decoders bytes that nobody of ours would send, each for SECONDS
	$(BIN)/pip install -q --editable '.[fuzz]'
	$(BIN)/python -m fuzz --seconds $(SECONDS) $(FUZZ_ARGS)

docs: install  ## Write anew what is written from parsers and data: docs/reference/cli.md, support_matrix.md
	$(BIN)/python scripts/cli_reference.py
	$(BIN)/python scripts/support_matrix.py

doctor: install  ## Put what `dynamo doctor` says of this machine into docs/reference/support_matrix.md
	$(BIN)/python scripts/support_matrix.py --doctor

dist:  ## Build wheels, source distributions and SBOMs into dist, the same bytes from the same commit
	@$(PYTHON) scripts/build_dist.py

clean:  ## Remove what the other targets made
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .schemathesis
