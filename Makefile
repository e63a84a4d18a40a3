# Every target makes the virtual environment it needs on its first call, and reuses it after.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: help demo test check format build clean

help:
	@echo "make demo    attention maps of a photograph, and an EMANet forward on it"
	@echo "make test    all tests"
	@echo "make check   formatting, lint, types"
	@echo "make format  put the formatting right"
	@echo "make build   wheel and sdist into dist/"

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "ema-attention needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)"; exit 1; }
	@echo "Installing into $(VENV) (torch and torchvision: about 5 GB, a few minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(INSTALLED)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) dist
