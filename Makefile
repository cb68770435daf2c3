# make help shows what there is. PYTHON chooses the interpreter (3.11 or later), VENV the environment's folder.
PYTHON ?= python3
VENV ?= .venv
FAISS ?= cpu
BIN := $(VENV)/bin

.PHONY: help run test nightly fuzz lowest newest lint bench calibrate replicate docs release clean
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

nightly: $(VENV)/.dev  ## every property on 10,000 examples
	DEJAVU_EXAMPLES=10000 $(BIN)/python -m pytest -m property

FUZZ_SECONDS ?= 60
FUZZ_SEED ?= 1
fuzz: $(VENV)/.dev  ## a minute of coverage-guided fuzzing of all readers (FUZZ_SECONDS=60; FUZZ_SEED=0 tries something else each time)
	$(BIN)/python tests/fuzz.py --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

LOWEST := build/lowest
lowest: $(VENV)/.dev  ## the quick tests with the lowest versions that pyproject.toml allows, in an environment of their own
	$(PYTHON) -m venv $(LOWEST)
	$(BIN)/python .ci/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$(FAISS),dev]' -c $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pytest -m 'not slow'

NEWEST := build/newest
newest:  ## the same with the newest versions, and with releases to come of hydra-core and omegaconf, which have upper bounds
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$(FAISS),dev]'
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --pre --upgrade hydra-core omegaconf
	$(NEWEST)/bin/python -m pytest -m 'not slow'

lint: $(VENV)/.dev  ## style, types and the import rule
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev  ## time the measurement's own parts side by side with other ways, in one run
	$(BIN)/python -m benchmarks

calibrate: $(VENV)/.run  ## plant memorization at known rates and measure it, forty minutes; writes docs/calibration.md
	$(BIN)/python -m dejavu_exp.calibrate --seeds 1000 scoring.resamples=1000
	$(BIN)/python -m dejavu_exp.calibrate --canaries 2,4,8,16
	{ cat outputs/calibration/calibration.md; echo; cat outputs/canaries/canaries.md; } > docs/calibration.md
	cp outputs/calibration/calibration.svg outputs/canaries/canaries.svg docs/

DATA ?= data
replicate: $(VENV)/.run  ## the paper's comparison on 20 classes of Tiny ImageNet in DATA, half an hour; resumes; writes docs/results.md
	$(BIN)/python benchmarks/replicate.py --data $(DATA)

docs: $(VENV)/.dev  ## build the documentation as a site, into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q -f docs/site/mkdocs.yml

RELEASE := build/release
release:  ## build wheel and source into dist/, with a list of all that they install (SBOM) and known faults of it (audit)
	rm -rf dist $(RELEASE) && $(PYTHON) -m venv $(RELEASE)/tools && $(PYTHON) -m venv $(RELEASE)/installed
	$(RELEASE)/tools/bin/python -m pip install --quiet --disable-pip-version-check build cyclonedx-bom pip-audit
	$(RELEASE)/tools/bin/python -m build --outdir dist .
	$(RELEASE)/installed/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls dist/*.whl)[$(FAISS)]"
	$(RELEASE)/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-format JSON --output-file dist/sbom.cdx.json $(RELEASE)/installed
	$(RELEASE)/tools/bin/pip-audit --path $$($(RELEASE)/installed/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') --format json --output dist/audit.json
	$(PYTHON) .ci/audited.py dist/audit.json

clean:  ## remove the environment, build products and outputs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis outputs/cache outputs/runs outputs/sweeps
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
