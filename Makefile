# make help shows what there is. PYTHON chooses the interpreter (3.11 or later), VENV the environment's folder.
PYTHON ?= python3
VENV ?= .venv
FAISS ?= cpu
BIN := $(VENV)/bin

.PHONY: help run test lint bench calibrate replicate clean docs
.DEFAULT_GOAL := help

help:  ## show this
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(FAISS)]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(FAISS),dev]'
	@touch $@

run: $(VENV)/.run  ## set up, then measure the embedded data set (a minute on two cores, no network after the setup)
	$(BIN)/python -m dejavu_exp

test: $(VENV)/.dev  ## set up, then run all tests
	$(BIN)/python -m pytest

lint: $(VENV)/.dev  ## style, types and the import rule
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev  ## time the measurement's own parts side by side with other ways, in one run
	$(BIN)/python -m benchmarks

calibrate: $(VENV)/.run  ## plant memorization at known rates and measure it, ten minutes; writes docs/calibration.md
	$(BIN)/python -m dejavu_exp.calibrate scoring.resamples=1000
	$(BIN)/python -m dejavu_exp.calibrate --canaries 2,4,8,16
	{ cat outputs/calibration/calibration.md; echo; cat outputs/canaries/canaries.md; } > docs/calibration.md
	cp outputs/calibration/calibration.svg outputs/canaries/canaries.svg docs/

DATA ?= data
replicate: $(VENV)/.run  ## the paper's comparison on 20 classes of Tiny ImageNet in DATA, half an hour; resumes; writes docs/results.md
	$(BIN)/python benchmarks/replicate.py --data $(DATA)

docs: $(VENV)/.dev  ## build the documentation as a site, into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q -f docs/site/mkdocs.yml

clean:  ## remove the environment, build products and outputs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis outputs/cache outputs/runs outputs/sweeps
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
