# make train / make test: the two commands of the README. Both need only Python 3.11+, make and pip.
# make test runs a pairwise part of the large matrices; make test-all runs everything.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/quickstart.toml

.PHONY: setup train test test-all lint clean

setup: .venv/.installed

# torch first and alone: it is pinned, so that no other package's range picks another build of it, and DeepSpeed's build
# wants it installed, for which builds are not isolated.
.venv/.installed: pyproject.toml constraints.txt distmerge/rules/dare.c distmerge/rules/ties.c distmerge/workers/codec.c
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test,bench,deepspeed]'
	touch $@

train: setup
	$(BIN)/distmerge train $(CONFIG)

# Two files of tests at a time: each starts several ranks, which wait for one another most of the time.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What DeepSpeed compiles is compiled before any rank could wait for it: minutes at first, then a second.
test: setup
	$(BIN)/distmerge build-ops
	$(PYTEST)

test-all: setup
	$(BIN)/distmerge build-ops
	$(PYTEST) -m 'full or not full'

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf .venv runs
