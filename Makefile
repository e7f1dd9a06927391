# Lorikeet's commands. `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# Compiled modules are kept, whatever the shell says: tests start hundreds of processes that import them.
unexport PYTHONDONTWRITEBYTECODE

# What serves: `cpu` or `gpu`. The default looks for a GPU; `make up PROFILE=cpu` overrides it.
PROFILE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
VENV := .venv
# Tests run on CPU packages, which do not live beside the GPU's.
DEV_VENV := $(if $(filter gpu,$(PROFILE)),.venv-dev,.venv)
BIN := $(VENV)/bin
DEV := $(DEV_VENV)/bin
CODE := adapters gateway trainer loadtests benchmarks tests scripts lorikeet.py

ifeq ($(PROFILE),cpu)
export LORIKEET_ENGINE ?= cpu
endif

##@ Serve

.PHONY: up
up: install ## Install what is missing, start engine and gateway, and wait until the model has answered
	@$(BIN)/lorikeet up

.PHONY: down
down: ## Stop all of it; leaves no process, socket or shared memory
	@if [ -x $(BIN)/lorikeet ]; then $(BIN)/lorikeet down; else echo "Nothing is installed, so nothing runs."; fi

.PHONY: status
status: install ## Is it ready, and what does each engine hold?
	@$(BIN)/lorikeet status

.PHONY: clients
clients: install-dev ## Ask a running gateway with curl, LangChain and LiteLLM, as the README shows it
	@PATH="$(CURDIR)/$(DEV):$$PATH" $(DEV)/python -m scripts.clients

.PHONY: demo
demo: install-dev ## The whole story in under fifteen minutes: train, upload, swap, attack, merge, load-test
	@LORIKEET_ENGINE=cpu PATH="$(CURDIR)/$(DEV):$$PATH" $(DEV)/python -m scripts.demo

##@ Develop

.PHONY: check
check: install-dev ## The loop one runs all day: format, lint, types, import rules and the fast tests
	@$(DEV)/ruff format --check --quiet $(CODE) || { echo "Not formatted: run make format" >&2; exit 1; }
	@$(DEV)/ruff check --quiet $(CODE)
	@$(DEV)/mypy
	@$(DEV)/lint-imports --no-logo
	@$(DEV)/pytest -q -n 4 --dist worksteal -m "not e2e and not slow and not gpu"

.PHONY: test
# Three processes and their engines share the cores: more threads would compute no faster, and wait for each other.
test: export OMP_NUM_THREADS := 1
test: install-dev ## Everything, the real engine included (under fifteen minutes on two cores, installation included)
	@$(DEV)/pytest -q -n 3 --dist loadfile --no-loadscope-reorder --durations=15 $(PYTEST_ARGS)

.PHONY: format
format: install-dev ## Format the code and mend what can be mended
	@$(DEV)/ruff check --quiet --fix-only $(CODE)
	@$(DEV)/ruff format $(CODE)

.PHONY: lint
lint: install-dev ## Ruff and the import rules between the rooms
	@$(DEV)/ruff check $(CODE)
	@$(DEV)/lint-imports --no-logo

.PHONY: types
types: install-dev ## mypy --strict
	@$(DEV)/mypy

.PHONY: bench
bench: install-dev ## Measure what docs/benchmarks.md reports, on a running `make up`; about twenty minutes
	@export PATH="$(CURDIR)/$(DEV):$$PATH"; \
	for name in cpu_lora engine_start start overhead swap; do $(DEV)/python -m benchmarks.$$name; done

.PHONY: bench-merge
bench-merge: install-dev ## Every form of one adapter under the same load, and what merging it takes; an hour and a half
	@export LORIKEET_ENGINE=cpu PATH="$(CURDIR)/$(DEV):$$PATH"; \
	for name in forms merge_memory quantize derived; do $(DEV)/python -m benchmarks.$$name; done

.PHONY: bench-gateway
bench-gateway: install-dev ## Others' gateways beside ours, a bare vLLM beside Lorikeet, a thousand adapters, a soak; ninety minutes
	@export LORIKEET_ENGINE=cpu PATH="$(CURDIR)/$(DEV):$$PATH"; \
	for name in gateway scale protection soak; do $(DEV)/python -m benchmarks.$$name; done

.PHONY: loadtest
loadtest: install-dev ## Steady, cold, working set, churn, noisy neighbour and chaos on the real engine: one report, 25 minutes
	@LORIKEET_ENGINE=cpu PATH="$(CURDIR)/$(DEV):$$PATH" $(DEV)/python -m scripts.loadtest_suite

##@ Install

.PHONY: install
install: ## Make .venv from the lock of this machine's profile (PROFILE=cpu or gpu)
	@scripts/install.sh $(PROFILE) $(VENV)

.PHONY: install-dev
install-dev: ## The same with what training and the tests need
	@scripts/install.sh dev $(DEV_VENV)

.PHONY: lock
lock: ## Resolve pyproject.toml into locks/*.txt anew
	@scripts/lock.sh

.PHONY: clean
clean: ## Remove virtual environments and caches; the data folder stays
	@rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help
help:
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n\033[1m%s\033[0m\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
