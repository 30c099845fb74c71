# `make` alone lists the targets. The others set up .venv when it is missing, and do nothing twice.
PYTHON ?= python3
PROMPT ?= a green cone
BIN := .venv/bin
RUN := $(BIN)/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
TWO := --numprocesses 2 --dist worksteal
OTHER := name another one with make PYTHON=python3.12
# PyPI's torch for Linux holds 3 GB of CUDA; PyTorch's own index has a build without.
CPU_TORCH ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell grep '^torch==' requirements.txt)
NVIDIA := test -e /proc/driver/nvidia/version || command -v nvidia-smi > /dev/null

.PHONY: help demo dream test test-all lint docs bench notebooks clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/ready ## train on the built-in scene, render it and measure PSNR: a minute on a CPU
	$(RUN) run_nerf.py --config configs/demo.txt

dream: .venv/ready ## text to 3D with the embedded model: make dream PROMPT="a green cone"
	$(RUN) run_dreamfusion.py --config configs/dream_tiny.txt --prompt "$(PROMPT)"

test: .venv/ready-dev ## the tests, without the slow ones, in two processes
	$(RUN) -m pytest $(TWO)

test-all: .venv/ready-dev ## all tests
	$(RUN) -m pytest $(TWO) -m "slow or not slow"

lint: .venv/ready-dev ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready-dev ## the API page, from the docstrings: docs/api/index.html
	$(BIN)/pdoc --output-directory docs/api nerf guidance

bench: .venv/ready ## speed and memory of the unchanged NeRF algorithm
	$(RUN) benchmarks/vanilla.py

notebooks: .venv/ready-dev ## make notebooks/*.ipynb of notebooks/*.py, and run them: minutes
	$(BIN)/jupytext --quiet --to ipynb notebooks/*.py
	$(BIN)/jupyter-nbconvert --to notebook --inplace --execute \
		--ExecutePreprocessor.record_timing=False notebooks/*.ipynb

clean: ## remove .venv, caches and the API page
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build docs/api *.egg-info

.venv/ready: requirements.txt pyproject.toml
	@command -v $(PYTHON) > /dev/null || \
		{ echo "no program $(PYTHON): install Python 3.11 or newer, or $(OTHER)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python %d.%d is too \
	old: install 3.11 or newer, or $(OTHER)" % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
		{ echo "$(PYTHON) has no venv module: apt install python3-venv, or $(OTHER)" >&2; exit 1; }
	@! test -x $(RUN) || $(RUN) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else ".venv is \
	of Python %d.%d, too old: make clean, then again" % sys.version_info[:2])'
	test -x $(RUN) || $(PYTHON) -m venv .venv
	@if test "$$(uname -s)" != Linux; then \
		echo "installing requirements.txt into .venv: 0.6 GB to download, 2 GB on disk"; \
	elif $(NVIDIA) || test -z "$(CPU_TORCH)"; then \
		echo "installing requirements.txt into .venv: 3 GB to download, 7 GB on disk, with CUDA"; \
	else \
		echo "no NVIDIA driver: installing requirements.txt into .venv with the CPU build of torch:" \
		"0.6 GB to download, 2 GB on disk (with CUDA all the same: make CPU_TORCH= ...)"; \
		$(PIP) --retries 1 --timeout 20 --index-url $(CPU_TORCH) $(TORCH) 2> /dev/null || \
		echo "$(CPU_TORCH) cannot be reached: torch comes from PyPI, 3 GB with CUDA"; \
	fi
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -e .
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@
