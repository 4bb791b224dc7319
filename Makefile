# make venv | demo | test | lint | format | table | clean
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: venv demo test lint format table clean

venv: .venv/.runtime

# A stamp is written last, so an interrupted installation starts over.
.venv/.runtime: requirements.txt
	rm -rf .venv
	$(PYTHON) -m venv .venv
	@echo 'installing requirements.txt (a few minutes, about 6 GB)'
	$(PIP) install 'setuptools<81' wheel
	$(PIP) install --no-build-isolation -r requirements.txt
	touch $@

.venv/.dev: .venv/.runtime requirements-dev.txt
	$(PIP) install --no-build-isolation -r requirements-dev.txt
	touch $@
