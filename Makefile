# make help lists the targets. Nothing is needed beforehand but Python 3.11 or newer.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
BIN    := $(VENV)/bin

# One BLAS thread a process: on models this small more threads only wait for each other.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-distributed test-versions test-main lint format readme bench chains bench-gpu clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST) | awk -F': ' '{printf "  make %-16s %s\n", $$1, $$2}'

quickstart: $(VENV)/.installed-plot  ## train and compare three losses on a tiny pretrained model, a few minutes
	$(BIN)/python recipes/quickstart/run.py $(ARGS)

test: $(VENV)/.installed-test,lint  ## the whole default suite (JOBS=2 processes; ARGS='-k dft' passes options to pytest)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-distributed: export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions  # DeepSpeed compiles one op, once
test-distributed: $(VENV)/.installed-test,lint $(VENV)/.installed-deepspeed  ## DDP, ZeRO and FSDP2 beside one process, on the CPU; writes benchmarks/parity.md
	PARITY_TABLE=benchmarks/parity.md PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m distributed $(ARGS)

VERSIONS := $(basename $(notdir $(wildcard tests/versions/*.txt)))

test-versions: $(VERSIONS:%=test-%)  ## the default suite with each set of tests/versions; with -k all of them, whatever fails

test-trl-%: .venv-versions/trl-%/.installed
	$(<D)/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# Main is outside the tested range, which the suite says in a warning and in two tests.
test-main: PACKAGES ?= trl transformers
test-main: | $(BIN)/pip  ## the default suite with main of TRL and of transformers; PACKAGES=trl takes main of TRL alone
	$(BIN)/python -m venv --clear .venv-versions/main
	.venv-versions/main/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	.venv-versions/main/bin/python -m pip install --quiet --upgrade $(PACKAGES:%=git+https://github.com/huggingface/%)
	.venv-versions/main/bin/python -m pytest -n $(JOBS) --dist worksteal -W "ignore:trl_qtarget is tested with" \
	    --deselect tests/test_compat.py::test_report \
	    --deselect tests/test_compat.py::test_this_environment_is_inside_the_range $(ARGS)

lint: $(VENV)/.installed-test,lint  ## ruff, import-linter, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-test,lint  ## what ruff can repair by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: $(VENV)/.installed-test,lint  ## write the table of losses into README.md
	$(BIN)/python tests/test_readme.py

bench: $(VENV)/.installed-test,lint  ## the kernels beside TRL's and beside the bare products: a table, curves, a CSV; ten minutes
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python -m benchmarks.kernel $(ARGS)

chains: $(VENV)/.installed-test,lint  ## SFT with each loss, then GRPO and DPO: the tables of recipes/sft-then-*; an hour or two
	$(BIN)/python -m benchmarks.chains $(ARGS)

bench-gpu: $(VENV)/.installed-test,lint  ## the tests and the benchmark that need a GPU
	$(BIN)/python -m pytest -m gpu tests/test_gpu.py
	$(BIN)/python -m benchmarks.kernel --device cuda --dtype bfloat16 --width 2048 --teacher_width 4096 $(ARGS)

clean:  ## remove the environment and everything the tools left behind
	rm -rf $(VENV) .venv-versions build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# DeepSpeed's ops are compiled when they are first used, and its setup wants the environment's own torch.
$(VENV)/.installed-deepspeed: $(VENV)/.installed-test,lint
	$(BIN)/python -m pip install --quiet setuptools wheel ninja py-cpuinfo
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt deepspeed
	@touch $@

# The stamp's name is the set of extras: pip runs again only when the requirements or the pins change.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@

.PRECIOUS: .venv-versions/%/.installed

# Pins of the set take the place of those in constraints.txt.
.venv-versions/%/.installed: tests/versions/%.txt pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m venv $(@D)
	awk -F'[=<>]' 'NR == FNR {print; pinned[$$1]; next} !($$1 in pinned)' $< constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt --editable ".[test]"
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trl-qtarget needs Python 3.11 or newer, this is " \
	    + sys.version.split()[0] + ": name another one, as in make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
