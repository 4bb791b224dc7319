# make [CPU=1] venv | demo | test | test-quick | test-long | gpu | lint | format | table | clean

PYTHON ?= python3
BIN := .venv/bin
# With CPU=1, PyTorch without CUDA: 200 MB in place of most of 6 GB.
INDEX := $(if $(CPU),--extra-index-url https://download.pytorch.org/whl/cpu)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --no-build-isolation $(INDEX)
# In .venv: a mark that it was made here, a mark that an installation has begun, and copies of what is installed.
MADE := .venv/made-by-make
BEGUN := .venv/installing
# The remains of an interrupted installation can look complete to pip.
AGAIN = $$([ ! -e $(BEGUN) ] || echo --ignore-installed)

.PHONY: venv venv-dev demo test test-quick test-long gpu lint format table clean

# A .venv that was not made here is used, but never removed.
venv:
	@[ -e .venv ] || { mkdir .venv && touch $(MADE); }
	@[ -x $(BIN)/python ] || [ -e $(MADE) ] || \
	    { echo '.venv is no virtual environment, it has no bin/python: move it away' >&2; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@cmp -s requirements.txt .venv/requirements.txt || { \
	    { $(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip; } && \
	    echo 'installing requirements.txt: some minutes, 6 GB' && again=$(AGAIN) && touch $(BEGUN) && \
	    $(PIP) 'setuptools<81' wheel && $(PIP) $$again -r requirements.txt && \
	    rm $(BEGUN) && cp requirements.txt .venv; }

venv-dev: venv
	@cmp -s requirements-dev.txt .venv/requirements-dev.txt || { again=$(AGAIN) && touch $(BEGUN) && \
	    $(PIP) $$again -r requirements-dev.txt && rm $(BEGUN) && cp requirements-dev.txt .venv; }

demo: venv
	$(BIN)/python reproduce.py demo

# Two tests at a time: most use a single thread.
test: venv-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The tests that start no process and compile nothing.
test-quick: venv-dev
	AT_QUICK_TESTS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# With 20 kills instead of 2, three seeds, and thousands of mutated files.
test-long: venv-dev
	AT_LONG_TESTS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Checks and measures on GPUs; AUTHORS=FOLDER: beside the authors' own step too.
gpu: venv-dev
	$(BIN)/python benchmarks/gpu.py

lint: venv-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes the tables of results from the logs in logs/.
table: venv
	$(BIN)/python reproduce.py table1 --rows 2 --show --markdown README.md
	$(BIN)/python reproduce.py table1 --rows 2 --methods teacher,student,at,full-const,kd,at-kd --epochs 16 --seeds 3 --show --markdown docs/results.md
	$(BIN)/python reproduce.py tuning --show --markdown docs/results.md
	$(BIN)/python reproduce.py controls --show --markdown docs/results.md

clean:
	[ -L .venv ] || [ ! -e $(MADE) ] || rm -rf .venv
	rm -rf .pytest_cache .ruff_cache .hypothesis logs/digits-e[0-9]*
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
