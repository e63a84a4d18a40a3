# Every target makes the virtual environment it needs on its first call, and reuses it after.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: help demo explorer train-quick test test-floor test-export test-integrations fuzz mutants bench bench-quick report docs check format build clean

help:
	@echo "make demo         attention maps of a photograph, and a page to look into them"
	@echo "make explorer     that page of your own images: IMAGES=..."
	@echo "make train-quick  a network learns a task that needs global context, and one without the unit (2 minutes)"
	@echo "make test         the tests, but for those of the targets below"
	@echo "make test-floor   the library's tests with the oldest PyTorch it admits"
	@echo "make test-export  exported units in OpenVINO, ExecuTorch, AOTInductor; conversion to Core ML"
	@echo "make test-integrations  the page docs/integrations.md: timm, ultralytics, transformers, Lightning, ..."
	@echo "make fuzz         10,000 random inputs, and every bit of a checkpoint flipped"
	@echo "make mutants      faults put into the library's core one at a time: which do the tests miss?"
	@echo "make bench        each block's time (15 minutes on 2 cores); make bench-quick (2 minutes)"
	@echo "make report       costs, memory, growth and targets as a page with pictures (half an hour)"
	@echo "make docs         the documentation into site/, with its links, snippets and notebooks checked"
	@echo "make check        formatting, lint, types"
	@echo "make format       put the formatting right"
	@echo "make build        wheel and sdist into dist/"

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "ema-attention needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)"; exit 1; }
	@echo "Installing into $(VENV): 6.4 GiB with CUDA, a few minutes, once. README.md says how to have less."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m examples.attention_maps
	@echo
	$(BIN)/python -m examples.explorer
	@echo
	@echo "The attention maps are in out/attention_maps.png."
	@echo "Open out/explorer.html in a browser to look into them."

explorer: $(INSTALLED)
	$(BIN)/python -m examples.explorer $(IMAGES)

train-quick: $(INSTALLED)
	$(BIN)/python -m examples.digit_scenes

test: $(INSTALLED)
	$(BIN)/python -m pytest

# The library with the oldest PyTorch that pyproject.toml admits (Python 3.10 to 3.13 have a wheel of it).
test-floor: $(VENV)-floor/.installed
	PYTHONPATH=src $(VENV)-floor/bin/python -m pytest tests/library tests/look src

$(VENV)-floor/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-floor
	$(VENV)-floor/bin/python -m pip install --quiet "torch==2.6.0" matplotlib pillow numpy hypothesis pytest
	@touch $@

# Heavy packages, some with demands of their own: each of these two has an environment for itself.
test-export: $(VENV)-export/.installed
	$(VENV)-export/bin/python -m pytest tests/integrations/test_export.py

test-integrations: $(VENV)-integration/.installed
	$(VENV)-integration/bin/python -m pytest tests/integrations/test_frameworks.py

$(VENV)-export/.installed $(VENV)-integration/.installed: $(VENV)-%/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-$*/bin/python -m pip install --quiet --editable '.[dev]' --group $*-tests
	@touch $@

fuzz: $(INSTALLED)
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/library/test_bad_input.py tests/examples/test_checkpoints.py \
		-k "no_input or no_flipped_bit"

# One fault at a time put into the library's core; what the tests miss is listed.
mutants: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --group mutants
	OMP_NUM_THREADS=1 $(BIN)/mutmut run
	$(BIN)/mutmut results

BENCH = $(BIN)/python -m pytest benchmarks/costs/bench_blocks.py -v --benchmark-sort=name --benchmark-columns=median,iqr,rounds

bench: $(INSTALLED)
	$(BENCH) --benchmark-autosave

bench-quick: $(INSTALLED)
	$(BENCH) --quick

report: $(INSTALLED)
	$(BIN)/python -m benchmarks.costs

# Not with -q: that silences warnings, and --strict with them.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(BIN)/python -m pytest tests/docs -m "slow or not slow"
	@echo "The site is in site/index.html; with search: $(BIN)/python -m http.server -d site"

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
