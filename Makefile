# SDNet. `make` lists the commands; each creates .venv first if there is none.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup lint types test test-all demo docs bench gpu-check

BIN := .venv/bin
READY := .venv/.ready
# Python 3.11 or later; constraints.txt is tested with 3.11. To choose one: make setup PYTHON=python3.13
PYTHON :=
PYTHONS := python3.11 python3.12 python3.13 python3.14 python3

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s  %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## create .venv with SDNet and everything that the other commands need
	@echo "Ready: $$($(BIN)/python -c 'import platform, torch; \
	  gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"; \
	  print(f"Python {platform.python_version()}, torch {torch.__version__}, {gpu}")')"

# On PyPI `torch` for Linux is the CUDA build, which also runs without a GPU. timm stands in a folder of its own: the
# command `accelerate` imports it if it can, and its torchvision fails beside a CPU build of torch.
$(READY): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version > /dev/null 2>&1; then \
	  for python in $(or $(PYTHON),$(PYTHONS)); do \
	    "$$python" -c 'import sys; assert sys.version_info >= (3, 11); import ensurepip, venv' 2> /dev/null && break; \
	    python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "SDNet needs Python >= 3.11 with the venv module; none of these is one: $(or $(PYTHON),$(PYTHONS))." >&2; \
	    echo "On Debian and Ubuntu: apt install python3-venv. Elsewhere: make setup PYTHON=/path/to/python" >&2; \
	    exit 1; \
	  fi; \
	  echo "+ $$python -m venv .venv"; \
	  "$$python" -m venv .venv; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/timm \
	  timm torchvision -c constraints.txt
	@touch $@

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## Pyright
	$(BIN)/pyright

# Tests run in parallel with one thread each, because the convolutions in tests are too small for several threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal

test: lint types ## lint, type checks and all tests that are not marked slow
	$(PYTEST) -m 'not slow'

test-all: test ## also the slow tests, and every Triton kernel compiled for six architectures (an hour)
	$(PYTEST) -m slow
	$(BIN)/python -m sdnet.bench.compile_check

demo: $(READY) ## train SDNet-18 on photographs from scikit-image (minutes on two cores)
	$(BIN)/python -m sdnet.train.demo_data demo/data
	rm -rf runs/demo
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  train/imagenet.py --recipe demo --data demo/data --out runs/demo

docs: $(READY) ## build the documentation site in site/
	$(BIN)/sphinx-build -W --keep-going -q docs site
	@echo "site/index.html"

bench gpu-check: OUT ?= runs/$@
bench: $(READY) ## measure operators, training and data loaders in five minutes; results in OUT=runs/bench
	$(BIN)/python -m sdnet.train.demo_data $(OUT)/data
	$(BIN)/python -m sdnet.bench kernels --operator csc --limit 3 --budget 90 --out $(OUT)
	$(BIN)/python -m sdnet.bench train --batch 8 --seconds 45 --budget 30 --out $(OUT)
	$(BIN)/python -m sdnet.bench load --data $(OUT)/data --image-size 64 --out $(OUT)
	$(BIN)/python -m sdnet.bench profile --image-size 64 --batch 32 --traces $(OUT) --out $(OUT)
	$(BIN)/python -m sdnet.bench report --results $(OUT) --whole $(OUT)/report.md

gpu-check: $(READY) ## check, qualify and measure on a GPU within 15 minutes; results in OUT=runs/gpu-check
	$(BIN)/python -m sdnet.bench gpu-check --out $(OUT)
