# Each target sets up what it needs in .venv; a second run finds it there.
PYTHON ?= python3
SIZE ?= full
OUT ?= runs/demo$(if $(filter-out full,$(SIZE)),-$(SIZE))
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test check clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z%-]+):.*## /\1\t/' | expand -t 12

demo: .venv/.demo  ## run the whole pipeline offline (SIZE=tiny for a quick look, TEACHER=recipe for another teacher)
	$(BIN)/retrieval-kd demo --out $(OUT) --size $(SIZE) $(if $(TEACHER),--teacher $(TEACHER))

test: check  ## everything that must pass: linters, types, architecture, tests
	$(BIN)/python -m pytest

check: .venv/.dev  ## linters, types and architecture only
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-%: .venv/.dev  ## run benchmarks/%.py
	$(BIN)/python benchmarks/$*.py

clean:  ## remove the environment and the caches; runs/ stays
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[cpu,demo]'
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[cpu,demo,onnx,api,lora,seismic,lucene,qdrant,milvus,dev]'
	@touch $@ .venv/.demo
