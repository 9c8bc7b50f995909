# karikomi: the three commands of a contributor are `make demo`, `make test` and `make check`.
#
# One environment, .venv, serves all of them: `demo` installs what the demonstration needs, `test`
# adds the rest, and `docs` what builds the pages. A stamp per set is keyed on pyproject.toml, constraints.txt and this folder's path,
# so that nothing is installed twice and a changed pin is never missed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

# Settings; give them on the command line: make test WORKERS=8
PIP_ARGS ?=
WORKERS ?= 2
MAX_SKIPS ?= 0
PYTEST_ARGS ?=
DEMO_OUT ?= runs/demo

BIN := .venv/bin
KEY := $(shell { cat pyproject.toml constraints.txt; echo '$(CURDIR)'; } | cksum | cut -d' ' -f1)
DEMO_STAMP := .venv/.demo-stamp-$(KEY)
TEST_STAMP := .venv/.test-stamp-$(KEY)
DOCS_STAMP := .venv/.docs-stamp-$(KEY)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -c constraints.txt
BENCHES := $(sort $(wildcard benchmarks/*.py))

# A Python that is named is taken at its word; without a name the first one that is new enough is taken.
ifdef PYTHON
CANDIDATES := $(PYTHON)
else
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python
endif

.PHONY: help demo demo-env test test-full test-env check docs dist bench clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' Makefile
	@echo '  settings: PYTHON=python3.12, PIP_ARGS=..., WORKERS=$(WORKERS), PYTEST_ARGS=..., DEMO_OUT=$(DEMO_OUT)'
	@echo '  torch without CUDA: PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"'

demo: demo-env ## compress a small network on real data that is bundled; writes runs/demo
	$(BIN)/karikomi compress --max-drop 0.02 --out $(DEMO_OUT)

# Bytecode is written: each of the many processes that the tests start would compile the package again.
test: test-env ## run every test, docstring example and documentation block
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n $(WORKERS) --max-skips $(MAX_SKIPS) $(PYTEST_ARGS)

test-full: export KARIKOMI_FULL = 1
test-full: test ## the same tests, with every case that `make test` samples

check: test-env ## lint, format, types and the layout of the house
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright
	$(BIN)/python -m pytest -q tests/layout

# Without --quiet, which would hide warnings from --strict as well.
docs: $(DOCS_STAMP) ## build the pages and the API reference into build/docs; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: test-env ## build wheel and sdist into dist
	rm -rf dist
	$(BIN)/python -m build --no-isolation

bench: test-env ## run every benchmark, one after another
	@test -n '$(BENCHES)' || echo 'no benchmarks yet'
	@for bench in $(BENCHES); do echo "== $$bench"; $(BIN)/python $$bench; done

clean: ## remove what can be made again, the environment included; runs/ stays
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

demo-env: $(DEMO_STAMP)
test-env: $(TEST_STAMP)

# A broken interpreter (its system Python was replaced, say) makes every stamp void.
$(shell $(BIN)/python -c '' 2>/dev/null || rm -f .venv/.*-stamp-*)

$(DEMO_STAMP):
	@$(make-venv)
	@echo 'installing karikomi[demo] into .venv (once; torch is the large part)'
	@$(INSTALL) -e '.[demo]'
	@rm -f .venv/.*-stamp-*; touch $@

# The tests run every framework at once; the demonstration's set is part of it.
$(TEST_STAMP):
	@$(make-venv)
	@echo 'installing karikomi[dev,demo,keras,jax,onnx,logs,trainers] into .venv (once; the frameworks are the large part)'
	@$(INSTALL) -e '.[dev,demo,keras,jax,onnx,logs,trainers]'
	@rm -f .venv/.*-stamp-*; touch $@ $(DEMO_STAMP)

# The reference is read from the source, so that the pages need no framework.
$(DOCS_STAMP):
	@$(make-venv)
	@echo 'installing karikomi[docs] into .venv (once)'
	@$(INSTALL) -e '.[docs]'
	@touch $@

define make-venv
$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && exit; \
lacking=''; \
for python in $(CANDIDATES); do \
    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
    $$python -c 'import ensurepip, venv' 2>/dev/null || { lacking=$$python; continue; }; \
    exec $$python -m venv --clear .venv; \
done; \
if test "$$lacking"; then \
    echo "$$lacking cannot make environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
else \
    echo 'karikomi needs Python 3.11 or later, found none as $(CANDIDATES); set PYTHON=/path/to/python' >&2; \
fi; \
exit 1
endef
