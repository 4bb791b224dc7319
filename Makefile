# make venv | demo | test | test-long | lint | format | table | clean

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet install

.PHONY: venv demo test test-long lint format table clean

venv: .venv/runtime

# The marks are written last: what was interrupted starts over.
.venv/runtime: requirements.txt
	rm -rf .venv
	$(PYTHON) -m venv .venv
	@echo 'installing requirements.txt: some minutes, 6 GB'
	$(PIP) 'setuptools<81' wheel
	$(PIP) --no-build-isolation -r requirements.txt
	touch $@

.venv/development: .venv/runtime requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

demo: .venv/runtime
	$(BIN)/python reproduce.py demo

test: .venv/development
	$(BIN)/python -m pytest

# With 20 kills instead of 2, three seeds, and thousands of mutated files.
test-long: .venv/development
	AT_LONG_TESTS=1 $(BIN)/python -m pytest

lint: .venv/development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The results in README.md, from the logs in logs/.
table: .venv/runtime
	$(BIN)/python reproduce.py table1 --rows 2 --epochs 16 --seeds 3 --show --markdown README.md

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis logs/digits-*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
