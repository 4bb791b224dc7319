# make venv | demo | test | test-long | lint | format | table | clean

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --no-build-isolation
# In .venv: that it was made here, that an installation has begun, and copies of the lists of what is installed.
MADE := .venv/made-by-make
BEGUN := .venv/installing
RUNTIME := cmp -s requirements.txt .venv/requirements.txt
DEVELOPMENT := cmp -s requirements-dev.txt .venv/requirements-dev.txt
# What an interrupted installation has left may look whole to pip.
AGAIN = $$([ ! -e $(BEGUN) ] || echo --ignore-installed)

.PHONY: venv venv-dev demo test test-long lint format table clean

# A .venv that was not made here is installed into, and never removed. An older Makefile, which made every .venv, left empty
# files in it, runtime and development, whose times told what is installed.
venv:
	@[ -e .venv ] || { mkdir .venv && touch $(MADE); }
	@[ -x $(BIN)/python ] || [ -e $(MADE) ] || \
	    { echo '.venv is no virtual environment, it has no bin/python: move it away' >&2; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@[ ! -e .venv/runtime ] || { [ requirements.txt -nt .venv/runtime ] || cp requirements.txt .venv; }
	@[ ! -e .venv/runtime ] || mv .venv/runtime $(MADE)
	@$(RUNTIME) || $(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip
	@$(RUNTIME) || echo 'installing requirements.txt: some minutes, 6 GB'
	@$(RUNTIME) || $(PIP) 'setuptools<81' wheel
	@$(RUNTIME) || { again=$(AGAIN); touch $(BEGUN) && $(PIP) $$again -r requirements.txt && rm $(BEGUN); }
	@$(RUNTIME) || cp requirements.txt .venv

venv-dev: venv
	@[ ! -e .venv/development ] || { [ requirements-dev.txt -nt .venv/development ] || cp requirements-dev.txt .venv; }
	@rm -f .venv/development
	@$(DEVELOPMENT) || { again=$(AGAIN); touch $(BEGUN) && $(PIP) $$again -r requirements-dev.txt && rm $(BEGUN); }
	@$(DEVELOPMENT) || cp requirements-dev.txt .venv

demo: venv
	$(BIN)/python reproduce.py demo

test: venv-dev
	$(BIN)/python -m pytest

# With 20 kills instead of 2, three seeds, and thousands of mutated files.
test-long: venv-dev
	AT_LONG_TESTS=1 $(BIN)/python -m pytest

lint: venv-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The results in README.md, from the logs in logs/.
table: venv
	$(BIN)/python reproduce.py table1 --rows 2 --epochs 16 --seeds 3 --show --markdown README.md

clean:
	[ -L .venv ] || [ ! -e $(MADE) -a ! -e .venv/runtime ] || rm -rf .venv
	rm -rf .pytest_cache .ruff_cache .hypothesis logs/digits-*
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
