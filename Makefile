# Every command of this project. Each target builds the environment it needs in .venv first; an
# environment is built again when pyproject.toml or constraints.txt changed.

PYTHON ?= python3
# Processes that share the tests. Each runs torch on one thread, so this should be at most the number of cores.
JOBS ?= 2
# How long `make fuzz` looks for files that a reader does not survive
MINUTES ?= 10
# More arguments for pytest, e.g. make test ARGS="-k budget -x"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# -qq: no warnings, but errors are still printed.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
INSTALL := $(PIP) install --constraint constraints.txt
# worksteal: each process starts with a share of neighbouring tests, so that what a file sets up is set up once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
LIBRARIES := .venv-libraries
# Fresh for every `make build`: what somebody has who installs the release.
RELEASE := .venv-release
SOURCES := src tests benchmarks docs examples

# GNU make must not pick up a half-built environment after an interruption.
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-libraries test-matrix gpu test-device fuzz check lint types fmt docs bench build clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: $(VENV)/.stamp-demo  ## Train, prune, verify and save a small network on handwritten digits
	$(BIN)/secateur demo

test: $(VENV)/.stamp-dev $(VENV)/.stamp-zoo  ## Run the tests, without the slow ones
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.stamp-dev $(VENV)/.stamp-zoo  ## Run all tests, the slow ones too
	$(PYTEST) -m "" $(ARGS)

test-libraries: $(LIBRARIES)/.stamp  ## Prune models of other libraries, in an environment of their own (slow)
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/src:$(CURDIR) $(LIBRARIES)/bin/python -m tests.libraries.run $(ARGS)
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/src:$(CURDIR) $(LIBRARIES)/bin/python -m tests.libraries.recipes

test-matrix:  ## Run the tests with other versions of torch and Python, in environments of their own (slow)
	$(PYTHON) -m tests.matrix $(if $(ARGS),-- $(ARGS))

# Such a machine often has a torch of its own and no network. If $(PYTHON) sees a device, it runs all, as it is.
gpu:  ## Run the tests that need a CUDA device, and measure on it
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then run=$(PYTHON); \
	else $(MAKE) $(VENV)/.stamp-dev $(VENV)/.stamp-zoo && run=$(BIN)/python || exit; fi; \
	export PYTHONPATH="$(CURDIR)/src:$(CURDIR):$$PYTHONPATH"; failed=0; \
	$$run -m pytest -n $(JOBS) -m cuda $(ARGS) || failed=$$?; \
	$$run -m benchmarks.bench_gpu || failed=$$?; exit $$failed

test-device: $(VENV)/.stamp-dev $(VENV)/.stamp-zoo  ## Run the tests of a device on a pretended one; needs a C++ compiler and ninja (slow)
	SECATEUR_DEVICE=pretended $(PYTEST) -p tests.cuda.pretended -m cuda $(ARGS)

fuzz: $(VENV)/.stamp-dev  ## Look for files that a reader does not survive; make fuzz MINUTES=60
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(MINUTES)

check: lint types test  ## What CI runs: lint, types, test

lint: $(VENV)/.stamp-dev  ## Check style and formatting
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.stamp-dev  ## Check the types
	$(BIN)/mypy

fmt: $(VENV)/.stamp-dev  ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix-only $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(VENV)/.stamp-docs  ## Build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(VENV)/.stamp-dev $(VENV)/.stamp-zoo  ## Run every benchmark; figures go to benchmarks/results
	@set -e; for script in benchmarks/bench_*.py; do \
		echo "== $$script"; $(BIN)/python -m benchmarks.$$(basename $$script .py); done

build: $(VENV)/.stamp-dev  ## Make the wheel and the sdist in dist, and try both in a fresh environment
	rm -rf dist $(RELEASE)
	$(BIN)/python -m hatchling build -d dist
	$(PYTHON) -m venv $(RELEASE)
	@echo "Installing the wheel into $(RELEASE), with torch (a large download)"
	@$(subst $(BIN),$(RELEASE)/bin,$(INSTALL)) torch
	@$(subst $(BIN),$(RELEASE)/bin,$(INSTALL)) "secateur[demo] @ file://$$(echo $(CURDIR)/dist/*.whl)"
	cd $(RELEASE) && bin/secateur demo --quick --out wheel
	@$(subst $(BIN),$(RELEASE)/bin,$(INSTALL)) --force-reinstall --no-deps dist/*.tar.gz
	cd $(RELEASE) && bin/secateur demo --quick --out sdist
	@ls -l dist

clean:  ## Remove the environment and everything that was built
	rm -rf $(VENV) $(LIBRARIES) $(RELEASE) .venv-matrix build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "secateur needs Python 3.10 or newer, but $(PYTHON) is " + sys.version.split()[0] + ". Do: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch alone and first, so that nothing that depends on it can choose another build of it.
$(VENV)/.stamp-torch: $(VENV)/.stamp-venv constraints.txt
	@echo "Installing torch into $(VENV) (a large download, once)"
	@$(INSTALL) torch
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-torch pyproject.toml
	@echo "Installing secateur into $(VENV)"
	@$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-torch pyproject.toml
	@echo "Installing secateur and its development set into $(VENV)"
	@$(INSTALL) --editable '.[dev]'
	@touch $@

# torchvision has no build for some Pythons and platforms; the tests that need one of these then skip and say so.
$(VENV)/.stamp-zoo: $(VENV)/.stamp-dev
	@echo "Installing timm, torchvision, transformers and Lightning into $(VENV) for tests"
	@$(INSTALL) --no-deps timm torchvision \
		|| echo "make: timm and torchvision could not be installed; the tests of their architectures will skip." >&2
	@$(INSTALL) transformers \
		|| echo "make: transformers could not be installed; the tests of its architectures will skip." >&2
	@$(INSTALL) --no-deps lightning lightning-utilities pytorch-lightning torchmetrics \
		|| echo "make: Lightning could not be installed; the tests of its callback will skip." >&2
	@touch $@

# torch first and alone; then each library without its dependencies, so that none can bring another torch.
$(LIBRARIES)/.stamp: constraints.txt pyproject.toml tests/libraries/packages.txt tests/libraries/requirements.txt
	$(PYTHON) -m venv $(LIBRARIES)
	@echo "Installing torch and the libraries into $(LIBRARIES) (a large download, once)"
	@$(subst $(BIN),$(LIBRARIES)/bin,$(INSTALL)) torch
	@$(subst $(BIN),$(LIBRARIES)/bin,$(INSTALL)) --editable . --requirement tests/libraries/requirements.txt
	@grep -v '^#' tests/libraries/packages.txt | while read -r package; do \
		$(subst $(BIN),$(LIBRARIES)/bin,$(INSTALL)) --no-deps "$$package" \
			|| echo "make: $$package could not be installed; its models will skip." >&2; done
	@touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-torch pyproject.toml
	@echo "Installing secateur and Sphinx into $(VENV)"
	@$(INSTALL) --editable '.[docs]'
	@touch $@
