# Everything runs from a virtual environment that the first target makes: Python 3.10 or newer and a network suffice.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# For faults: how many runs to strike, and how many at a time.
N ?= 100
JOBS ?= 1

# For test and quick: how many tests at a time. Two for each core, since much of a launch is waiting; 4 GB for each.
WORKERS ?= $(shell $(PYTHON) -c 'import os; memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"); \
	print(max(1, min(2 * len(os.sched_getaffinity(0)), memory >> 32)))')
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# For quick: the house's rules, the contract, the parts that need no launch, and a launch of each kind.
QUICK := tests/house/test_layering.py tests/house/test_claims.py tests/house/test_docs.py tests/contract/test_loading.py \
	tests/contract/test_target.py tests/contract/test_filelock.py tests/launcher/test_cli.py \
	tests/trainer/loss/test_units.py tests/trainer/data/test_order.py \
	tests/launcher/commands/test_runs.py \
	tests/e2e/test_launch.py

# For gpu: where the page of results goes.
OUT ?= build/gpu

.PHONY: demo test quick check lock faults bench gpu cluster-up cluster-down clean

demo: $(VENV)/installed  ## Train on handwritten digits with 2 processes
	$(BIN)/dtrain launch --gpus 2 examples/digits/job.yaml

test: check  ## Run all tests
	$(PYTEST)

quick: $(VENV)/installed  ## Run the tests that tell most for their time
	$(PYTEST) $(QUICK)

check: $(VENV)/installed  ## Lint, type-check, and spell-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	@# What is imported is declared; tests import each other by names that deptry can't know.
	$(BIN)/deptry dtrain launcher slurm trainer
	$(BIN)/deptry tests bench examples --exclude '\.venv' --ignore DEP001,DEP002,DEP004
	@# mypy sees the package as users do, installed: in the repository its folders lie apart.
	@rm -rf build
	$(BIN)/pip install -q --no-deps --target build/typed .
	cd build/typed && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) -p dtrain
	cd build/typed && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) $(abspath bench)
	$(BIN)/mypy slurm/devcluster/cluster.py

lock: $(VENV)/installed  ## Write the versions that are installed, once all tests have passed with them: pip install -c constraints.txt
	{ echo "# The versions with which all tests have passed (make lock), with $$($(BIN)/python --version)."; \
		$(BIN)/pip freeze --exclude-editable; } > constraints.txt

faults: $(VENV)/installed  ## Kill and stop N runs, which must go on to the same bits; break N more, which must say why; compare 300 random trainings with a plain loop; launch 50 at once; interrupt a run on Slurm
	$(BIN)/python -m pytest -m campaign
	$(BIN)/python tests/faults/campaign.py --trials $(N) --jobs $(JOBS)
	$(BIN)/python tests/faults/headlines.py --trials $(N) --jobs $(JOBS)
	$(BIN)/python tests/faults/crowd.py
	$(BIN)/python tests/faults/slurm.py

bench: $(VENV)/installed-bench  ## Measure side by side with the peers
	$(BIN)/python bench/launch.py --plot docs/launch.png
	$(BIN)/python bench/order.py
	$(BIN)/python bench/loading.py
	$(BIN)/python bench/checkpoint.py
	$(BIN)/python bench/batch_norm.py
	$(BIN)/python bench/step.py
	$(BIN)/python bench/step.py --ranks 2
	$(BIN)/python bench/step.py --ranks 2 --width 600

# From a bare checkout too: of what dtrain imports, the machine may lack mlflow and deepspeed.
gpu:  ## What only a GPU shows, in 9 minutes at most; the page of results is in $(OUT)
	$(or $(wildcard $(BIN)/python),$(PYTHON)) tests/gpu/run.py --out $(OUT)

cluster-up:  ## A Slurm cluster of two nodes on this machine (needs root), to try things out: source .devcluster/env.sh
	$(PYTHON) slurm/devcluster/cluster.py up

cluster-down:  ## End it, and all that runs on it
	$(PYTHON) slurm/devcluster/cluster.py down

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("dtrain needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[test]'
	touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(BIN)/python -m pip install -e '.[bench]'
	touch $@

clean:
	rm -rf build $(VENV) runs mlruns mlflow.db*
