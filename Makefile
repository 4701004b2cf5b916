# make train / make test: the two commands of the README. Both need only Python 3.11+, make and pip.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/quickstart.toml

.PHONY: setup train test lint clean

setup: .venv/.installed

# torch first and alone: it is pinned, so that no other package's range picks another build of it.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,bench]'
	touch $@

train: setup
	$(BIN)/distmerge train $(CONFIG)

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf .venv runs
