# PYTHON chooses the interpreter the environment is made with: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint docs screenshots bench clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("tunesmith needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; try: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/tunesmith demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The page is tried in a real browser: the one that is here, Debian's, or playwright's own.
$(VENV)/.browser: | setup
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
	  || (apt-get update -qq && apt-get install -qq -y chromium fonts-noto-cjk) \
	  || $(BIN)/playwright install chromium \
	  || echo 'no browser could be installed; the tests that need one will be skipped'
	@touch $@

# Two tests at a time, each on a core of its own: sooner done than one after another on both.
test: lint $(VENV)/.browser
	$(BIN)/python -m pytest -n 2 --dist worksteal

docs: setup
	$(BIN)/python docs/generate_cli.py

screenshots: $(VENV)/.browser
	$(BIN)/python docs/generate_screenshots.py

bench: setup
	$(BIN)/python benchmarks/chat.py

clean:
	rm -rf $(VENV)
