# `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXPERIMENT ?= compare
ARGS ?=
RUNS ?= runs
SEEDS ?= 1,2,3
FORM ?= quick
# Arms are compared seed by seed; an experiment that lists seeds of its own, or ARGS with some, is left as it is.
seeds = $(if $(or $(findstring seed=,$(ARGS)),$(shell grep -sl '^ *seed:' conf/experiment/$(EXPERIMENT).yaml)),,seed=$(SEEDS))
# What the claims of docs/claims.md are judged by, and what it explains BASE's place with, in the order in which one
# experiment needs another.
CLAIMS := compare paper placement expert_size solver group_size shuffle english
REASONS := epochs gate router_scale router_learning_rate learning_rate router_norm num_experts final_plan replay_final length
ABLATIONS := $(filter-out $(CLAIMS) $(REASONS),$(patsubst conf/experiment/%.yaml,%,$(wildcard conf/experiment/*.yaml)))

.DEFAULT_GOAL := help

.PHONY: help
help:  ## This list
	@echo "what one needs:"
	@awk -F ':.*##! ' '/^[a-z-]+:.*##! / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "the rest:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "experiments: $(patsubst conf/experiment/%.yaml,%,$(wildcard conf/experiment/*.yaml))"
	@echo "routers:     $(patsubst conf/router/%.yaml,%,$(wildcard conf/router/*.yaml))"

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "error: PYTHON=$(PYTHON) is Python %d.%d; make PYTHON=python3.11 (or 3.12, 3.13) would do" % v)'
	@echo "setting up $(VENV), once: about a minute, most of it for unpacking and compiling torch"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

# Training needs none of what tests and benchmarks do.
$(VENV)/installed-dev: $(VENV)/installed
	@echo "adding to $(VENV) what tests and benchmarks need, once"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	@command -v chromium > /dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null || \
		{ apt-get -qq update && apt-get -qq install -y chromium > /dev/null; } || echo "no Chromium: the tests in a browser skip"
	@touch $@

.PHONY: setup
setup: $(VENV)/installed  ## Makes .venv from constraints.txt, with what training needs

.PHONY: setup-dev
setup-dev: $(VENV)/installed-dev  ## The same with what tests, checks and benchmarks need

.PHONY: experiment
experiment: setup  ##! The comparison and its report; EXPERIMENT=name for another, SEEDS=1,2,3, ARGS="key=value ...", FRESH=1 to start over
	@$(if $(EXPERIMENT),,echo "error: say which: make experiment EXPERIMENT=compare" && exit 2)
	@$(if $(filter 1,$(FRESH)),rm -rf "$(RUNS)/$(EXPERIMENT)")
	@$(BIN)/python experiments/train.py experiment=$(EXPERIMENT) name=$(EXPERIMENT) "runs_dir=$(RUNS)" $(seeds) $(ARGS); code=$$?; \
	if [ $$code -ne 2 ] && [ $$code -ne 130 ] && [ -d "$(RUNS)/$(EXPERIMENT)" ]; then \
		$(BIN)/python experiments/report.py "$(RUNS)/$(EXPERIMENT)" || [ $$code -ne 0 ] || code=$$?; \
	fi; exit $$code

.PHONY: ablation
ablation:  ## NAME=name: the same as experiment, for an ablation
	@$(if $(NAME),,echo "error: say which: make ablation NAME=capacity_factor" && exit 2)
	@$(MAKE) --no-print-directory experiment EXPERIMENT=$(NAME)

.PHONY: ablations
ablations: setup-dev  ## All experiments, one after the other; those that are done are skipped
	@for name in $(CLAIMS) $(REASONS) $(ABLATIONS); do $(MAKE) --no-print-directory experiment EXPERIMENT=$$name || exit; done

.PHONY: claims
claims: setup-dev  ##! Runs what the paper's claims are judged by, goes on where it was, and fills docs/claims.md
	@for name in $(CLAIMS); do \
		$(MAKE) --no-print-directory experiment EXPERIMENT=$$name ARGS="hydra/launcher=parallel $(ARGS)" || exit; \
	done
	@$(BIN)/python experiments/claims.py "$(RUNS)" $(ARGS)

.PHONY: report
report: setup  ##! EXPERIMENT=name: writes and names the report of what has run
	@$(BIN)/python experiments/report.py "$(RUNS)/$(EXPERIMENT)"

.PHONY: analysis
analysis: setup  ## RUN=runs/compare/router=base: what the experts of a finished run have learnt
	@$(if $(RUN),,echo "error: say which: make analysis RUN=runs/compare/router=base" && exit 2)
	@$(BIN)/python experiments/analysis.py "$(RUN)" $(ARGS)

.PHONY: export
export: setup  ## RUN=runs/compare/router=base,seed=1: its newest checkpoint as export/model.safetensors with a JSON beside it
	@$(if $(RUN),,echo "error: say which: make export RUN=runs/compare/router=base,seed=1" && exit 2)
	@$(BIN)/python experiments/export.py "$(RUN)" $(ARGS)

.PHONY: tensorboard
tensorboard: setup  ##! Shows all runs at http://localhost:6006
	@echo "arms side by side: http://localhost:6006/#custom_scalars; their options and results: http://localhost:6006/#hparams"
	@$(BIN)/tensorboard --logdir $(RUNS)

.PHONY: screenshots
screenshots: setup-dev  ## EXPERIMENT=name: photographs TensorBoard with its runs into docs/images
	@$(BIN)/python tests/tensorboard/screenshots.py "$(RUNS)/$(EXPERIMENT)" docs/images

.PHONY: benchmark
benchmark: setup-dev  ## Layer, step, harness, start, data, ranks and solver, the short form: about ten minutes on two cores
	@$(BIN)/python experiments/benchmark.py all --quick --json $(RUNS)/benchmark.json $(ARGS)

.PHONY: benchmark-check
benchmark-check: setup-dev  ## The same (FORM=shortest: two minutes), and names the ratios that are worse than in docs/benchmark_baseline.json
	@$(BIN)/python experiments/benchmark.py all --$(FORM) --check --json $(RUNS)/benchmark.json $(ARGS)

.PHONY: test
test: setup-dev  ##! The tests in their short form, minutes on two cores
	@$(BIN)/python -m pytest -n 2 -m "not exhaustive" $(ARGS)

.PHONY: test-all
test-all: setup-dev  ## The tests with their long forms too; ARGS="-m exhaustive" for these alone
	@$(BIN)/python -m pytest -n 2 $(ARGS)

.PHONY: test-slurm
test-slurm: setup-dev  ## A sweep on a Slurm of one node that pre-empts; as root, on Debian
	@command -v slurmctld > /dev/null || { apt-get -qq update && apt-get -qq install -y --no-install-recommends \
		slurmctld slurmd slurm-client munge > /dev/null; }
	@$(BIN)/python -m pytest -n 1 -m slurm tests/launchers $(ARGS)

.PHONY: mutations
mutations: setup-dev  ## Breaks the code in a copy, one fault at a time: the short form has to find each
	@$(BIN)/python tests/mutations $(ARGS)

.PHONY: docs
docs: setup-dev  ## Builds the documentation into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

.PHONY: docs-serve
docs-serve: setup-dev  ## Shows the documentation at http://localhost:8000, and follows changes
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

.PHONY: check
check: setup-dev docs  ## Format, lint, types, import layers, documentation
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: format
format: setup-dev  ## Formats the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.PHONY: clean
clean:  ## Removes .venv and caches; keeps runs/
	@rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
