# Every target sets up .venv when it is missing, and does nothing twice.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python

.PHONY: demo dream test test-all lint bench notebooks clean

demo: .venv/ready
	$(RUN) run_nerf.py --config configs/demo.txt

PROMPT ?= a green cone

dream: .venv/ready
	$(RUN) run_dreamfusion.py --config configs/dream_tiny.txt --prompt "$(PROMPT)"

test: .venv/ready-dev
	$(RUN) -m pytest

test-all: .venv/ready-dev
	$(RUN) -m pytest -m "slow or not slow"

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/ready
	$(RUN) benchmarks/vanilla.py

notebooks: .venv/ready-dev
	$(BIN)/jupytext --quiet --to ipynb notebooks/*.py

.venv/ready: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
