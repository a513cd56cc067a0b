# `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXPERIMENT ?= compare
ARGS ?=
RUNS ?= runs

.DEFAULT_GOAL := help

.PHONY: help
help:  ## This list
	@echo "make experiment                        the comparison: dense, BASE, Switch and top-k, then the report"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-33s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "experiments: $(patsubst conf/experiment/%.yaml,%,$(wildcard conf/experiment/*.yaml))"
	@echo "routers:     $(patsubst conf/router/%.yaml,%,$(wildcard conf/router/*.yaml))"

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "error: PYTHON=$(PYTHON) is Python %d.%d; make PYTHON=python3.11 (or 3.12, 3.13) would do" % v)'
	@echo "setting up $(VENV), once"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@

.PHONY: setup
setup: $(VENV)/installed  ## Makes .venv from constraints.txt

.PHONY: experiment
experiment: setup  ## EXPERIMENT=name ARGS="key=value ..." FRESH=1 to start over: runs conf/experiment/name.yaml
	@$(if $(EXPERIMENT),,echo "error: say which: make experiment EXPERIMENT=compare" && exit 2)
	@$(if $(filter 1,$(FRESH)),rm -rf "$(RUNS)/$(EXPERIMENT)")
	@$(BIN)/python experiments/train.py experiment=$(EXPERIMENT) name=$(EXPERIMENT) "runs_dir=$(RUNS)" $(ARGS); code=$$?; \
	if [ $$code -ne 2 ] && [ $$code -ne 130 ] && [ -d "$(RUNS)/$(EXPERIMENT)" ]; then \
		$(BIN)/python experiments/report.py "$(RUNS)/$(EXPERIMENT)" || [ $$code -ne 0 ] || code=$$?; \
	fi; exit $$code

.PHONY: ablation
ablation:  ## NAME=name: the same as experiment, for an ablation
	@$(if $(NAME),,echo "error: say which: make ablation NAME=capacity_factor" && exit 2)
	@$(MAKE) --no-print-directory experiment EXPERIMENT=$(NAME)

.PHONY: report
report: setup  ## EXPERIMENT=name: writes and names the report of what has run
	@$(BIN)/python experiments/report.py "$(RUNS)/$(EXPERIMENT)"

.PHONY: analysis
analysis: setup  ## RUN=runs/compare/router=base: what the experts of a finished run have learnt
	@$(if $(RUN),,echo "error: say which: make analysis RUN=runs/compare/router=base" && exit 2)
	@$(BIN)/python experiments/analysis.py "$(RUN)" $(ARGS)

.PHONY: tensorboard
tensorboard: setup  ## Shows all runs at http://localhost:6006
	@$(BIN)/tensorboard --logdir $(RUNS)

.PHONY: benchmark
benchmark: setup  ## The solvers against their peers
	@$(BIN)/python experiments/benchmark.py assignment

.PHONY: test
test: setup  ## The whole test suite
	@$(BIN)/python -m pytest $(ARGS)

.PHONY: check
check: setup  ## Format, lint, types, import layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: format
format: setup  ## Formats the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.PHONY: clean
clean:  ## Removes .venv and caches; keeps runs/
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
