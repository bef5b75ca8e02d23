# Two commands do everything from a fresh clone: `make demo` and `make test`. Both build .venv first.
SHELL := /bin/bash
PY := .venv/bin/python
# A model or data of one's own may lie on the hub; everything else needs none.
export HF_HUB_OFFLINE ?= $(if $(MODEL)$(DATA),0,1)
RECIPE ?= math
PAIRS ?= 1
STEPS ?= 4
OUT ?= outputs/demo-$(RECIPE)
# Bytecode is kept: without it every engine process imports for 10 s longer.
unexport PYTHONDONTWRITEBYTECODE
# Files and output are UTF-8 whatever the machine's language is.
export LC_ALL := C.UTF-8
unexport RAY_ADDRESS

.PHONY: help venv tools demo test lint test-fast test-e2e test-pins test-newest bench-rehearsal docs site clean

help:  ## what can be made
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

tools:  ## what the tests need of the system (bubblewrap, Chromium): installed as root on Debian and Ubuntu, else named
	@envs/tools.sh

venv:  ## build .venv (CPU, or GPU where there is one); seconds when nothing changed
	@envs/setup.sh auto .venv

demo: export WANDB_MODE ?= $(if $(WANDB_API_KEY),online,offline)
demo: venv  ## a recipe (RECIPE=math or coding), stock verl against heddle: a table, a page, W&B (STEPS, PAIRS, OUT, MODEL, ARGS)
	@.venv/bin/verl-heddle compare --recipe $(RECIPE) --pairs $(PAIRS) --steps $(STEPS) --out $(OUT) -- $(ARGS)

test: export HEDDLE_SKIPPED := $(CURDIR)/.setup/skipped.txt
test:  ## everything
	@mkdir -p .setup && rm -f $(HEDDLE_SKIPPED)
	@echo "make test: set-up, lint, tests without engines, tests with real engines;" \
	  "$$(cat .setup/took.txt 2>/dev/null || echo 'about 50 minutes on two cores')"
	@start=$$SECONDS; $(MAKE) --no-print-directory lint test-fast test-e2e && echo "$$(((SECONDS - start) / 60)) minutes the last time here" >.setup/took.txt
	@echo "make test: all passed, $$(cat .setup/took.txt | cut -d' ' -f1,2)$$([ -e $(HEDDLE_SKIPPED) ] && echo '; skipped:' || echo '; nothing skipped')"
	@[ ! -e $(HEDDLE_SKIPPED) ] || cat $(HEDDLE_SKIPPED)

lint: venv  ## format, lint, types
	@.venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/mypy

test-fast: venv tools  ## all tests without Ray and engines, a file of tests to each core in turn
	@$(PY) -m pytest -m "not e2e" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-e2e: venv tools  ## real verl, real vLLM engines, real Ray: runs of verl two at a time, as most of a run is imports, one after the other
	@$(PY) -m pytest -m "e2e and not alone" -n 2 --dist loadfile --no-loadscope-reorder
	@$(PY) -m pytest -m "e2e and alone"

test-pins: tools  ## contract and engine tests against the vLLM that verl pins for GPUs (0.24.0), in .venv-pins
	@envs/setup.sh cpu-pins .venv-pins
	@.venv-pins/bin/python -m pytest tests/contract tests/e2e/test_engine.py

test-newest: tools  ## the same against the newest vLLM that installs beside verl (0.31.0), in .venv-newest
	@envs/setup.sh cpu-newest .venv-newest
	@.venv-newest/bin/python -m pytest tests/contract tests/e2e/test_engine.py

bench-rehearsal: venv  ## every experiment of bench/gpu on the CPU with a tiny model, JSON checked; ten minutes; no figure of it is a GPU's
	@$(PY) bench/gpu/run.py --profile rehearsal --budget-minutes 14.5 --again

docs: venv  ## write docs/configuration.md and what is generated in README.md
	@.venv/bin/verl-heddle overrides --markdown >docs/configuration.md
	@$(PY) tests/docs/docs_support.py
	@$(PY) bench/readme_figure.py
	@$(PY) bench/provenance.py

site: venv  ## the pages as a site in outputs/site, read without network; a warning is an error
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

clean:  ## remove what was built
	rm -rf .venv .venv-pins .venv-newest .setup outputs
