# Two commands make the book and prove it: `make book` and `make test`. Both set up a .venv of their own first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup lock book test clean

help:
	@echo "make setup   a .venv from requirements.lock, every file checked against its hash (PYTHON=python3.12 to choose one)"
	@echo "make book    run every chapter in the smoke profile and render the book into _build/html"
	@echo "make test    ruff, mypy, pytest, and the chapters' outputs compared with nbval"
	@echo "make lock    resolve requirements.lock anew from pyproject.toml"
	@echo "make clean   remove what book and test built; .venv and the measurements in runs/ stay"

setup: $(READY)

# uv is in the lock like everything else: its own entry is cut out, so that pip checks the hash of the installer too.
$(BIN)/uv:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit( \
	  "Python 3.11 or newer is needed, and $(PYTHON) is " + v + ": name another, as in  make setup PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	@awk '/^[^ ]/ { keep = /^uv==/ } keep && !/#/' requirements.lock > $(VENV)/uv.lock
	$(BIN)/python -m pip install --quiet --require-hashes --requirement $(VENV)/uv.lock

$(VENV)/.synced: requirements.lock | $(BIN)/uv
	$(BIN)/uv pip sync --python $(BIN)/python --require-hashes requirements.lock
	@touch $@

# setuptools is in the lock, so the editable install needs neither build isolation nor the network.
$(READY): $(VENV)/.synced pyproject.toml
	$(BIN)/uv pip install --python $(BIN)/python --quiet --offline --no-deps --no-build-isolation --editable .
	@touch $@

lock: | $(BIN)/uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --extra book --extra dev --extra cluster pyproject.toml -o requirements.lock

book: $(READY)
	$(BIN)/python -m tools.book

# One thread a process: on small tensors several processes use two cores better than one process with two threads.
test: export OMP_NUM_THREADS = 1
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --durations 10
	rm -rf _build/replay
	SYNTHREPRO_RUNS=$(CURDIR)/_build/replay $(BIN)/pytest -c tests/notebooks/nbval.ini --rootdir . --numprocesses auto --maxprocesses 4 notebooks

clean:
	rm -rf _build .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
