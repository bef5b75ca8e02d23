# Two commands do everything from a fresh clone: `make demo` and `make test`. Both build .venv first.
SHELL := /bin/bash
PY := .venv/bin/python
export HF_HUB_OFFLINE ?= 1
RECIPE ?= math
# Bytecode is kept: without it every engine process imports for 10 s longer.
unexport PYTHONDONTWRITEBYTECODE
unexport RAY_ADDRESS

.PHONY: help venv demo test lint test-fast test-e2e test-pins docs clean

help:  ## what can be made
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

venv:  ## build .venv (CPU, or GPU where there is one); seconds when nothing changed
	@envs/setup.sh auto .venv

demo: venv  ## a recipe's job (RECIPE=math or coding): GRPO with tools, stock and heddle, on W&B, with a table at the end
	@RECIPE=$(RECIPE) $(PY) recipes/demo.py

test: lint test-fast test-e2e  ## everything

lint: venv  ## format, lint, types
	@.venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/mypy

test-fast: venv  ## all tests without Ray and engines
	@$(PY) -m pytest -m "not e2e"

test-e2e: venv  ## real verl, real vLLM engines, real Ray
	@$(PY) -m pytest -m e2e

test-pins:  ## contract and engine tests against the vLLM that verl pins for GPUs (0.24.0), in .venv-pins
	@envs/setup.sh cpu-pins .venv-pins
	@.venv-pins/bin/python -m pytest tests/contract tests/e2e/test_engine.py

docs: venv  ## write docs/configuration.md from the code
	@.venv/bin/verl-heddle overrides --markdown >docs/configuration.md

clean:  ## remove what was built
	rm -rf .venv .venv-pins .setup outputs
