# One entry point for people and CI. `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  := torch==2.13.0
FLOORS := kernels model_store cache server

.DEFAULT_GOAL := help

.PHONY: help links
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

links: ## the tree through which type checkers see the folders as scone.*
	@mkdir -p .types/scone && for d in $(FLOORS); do ln -sfn ../../$$d .types/scone/$$d; done
