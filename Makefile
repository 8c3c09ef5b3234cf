# Everything is installed into .venv; the first target that needs it creates it. The machine needs only Python 3.11, git and make.
#
# torch is installed first, at a fixed version. On Linux x86-64 the default index has a build with several GB of CUDA,
# which this release does not use. To get the CPU build there:
#   make demo TORCH='--index-url https://download.pytorch.org/whl/cpu torch==2.13.0'

TORCH ?= torch==2.13.0
MODELS ?= smollm2:135m gemma3:270m
PYTEST ?= -m 'not slow and not netlab'
CHAOS ?= --seed 1 --peers 5 --clients 8 --faults 200
CHAOS_SHORT ?= --seed 20 --clients 8 --faults 12 --short --minutes 3
SAME_ANSWERS ?= onnxruntime
SIM ?= --seeds 0..2000 --faults 6
SIM_DAYS ?= --days 24
SOAK ?= --minutes 60
SOAK_SHORT ?= --minutes 2 --restart-every 40
FUZZ ?= --seconds 60

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

ENOUGH = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.14 python; do \
	"$$python" -c '$(ENOUGH)' 2>/dev/null && echo "$$python" && break; done)

.PHONY: install demo test netlab check diagrams formats screenshots bench bench-short chaos chaos-short same-answers same-answers-short sim sim-days soak soak-short fuzz wheel clean
.DELETE_ON_ERROR:

install: $(VENV)/installed

demo: $(VENV)/installed
	$(BIN)/meshd demo

test: $(VENV)/installed $(VENV)/group-test
	for model in $(MODELS); do $(BIN)/meshd pull $$model || exit; done
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --ignore tests/cluster/same_answers/test_any_way.py $(PYTEST)

# Real daemons on several hosts, made of network namespaces: needs root.
netlab: $(VENV)/installed $(VENV)/group-test
	$(BIN)/meshd pull smollm2:135m
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -rs tests/netlab

check: $(VENV)/installed $(VENV)/group-test $(VENV)/group-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Writes docs/state-machines.md from the tables of the state machines.
diagrams: $(VENV)/installed
	$(BIN)/python -P tests/project/diagrams.py

# Writes the README's table of formats and architectures from the tests that passed.
formats: $(VENV)/installed $(VENV)/group-test
	$(BIN)/python -P tests/project/formats_table.py

# Writes docs/pictures from a real cluster of three peers that answers while a peer is killed.
screenshots: $(VENV)/installed $(VENV)/group-test
	$(BIN)/meshd pull smollm2:135m
	$(BIN)/python -P tests/tui/pictures.py --pictures docs/pictures

bench: $(VENV)/installed $(VENV)/group-test
	$(BIN)/meshd bench
	for figure in tests/benchmarks/bench_*.py; do echo "--- $$figure"; $(BIN)/python -P "$$figure" || exit; done

# The short form of each benchmark: it shows that the benchmark runs, not how fast meshd is.
bench-short: FIGURE = $(BIN)/python -P tests/benchmarks/bench
bench-short: $(VENV)/installed $(VENV)/group-test
	$(FIGURE)_planner.py --clusters 1
	$(FIGURE)_hop.py --count 200
	$(FIGURE)_kernels.py --backend onnxruntime --threads 1 --context 128
	$(FIGURE)_attention.py --seconds 0.1
	$(FIGURE)_pause.py --rounds 1 --tokens 4 --prompt 256
	$(FIGURE)_fidelity.py --positions 64 --context 64 --kinds file Q4_K --exact
	$(FIGURE)_sampler.py --vocab 49152 --repeat 3
	$(FIGURE)_split.py --rounds 1 --tokens 16
	$(FIGURE)_journal.py --rounds 1 --tokens 32
	$(FIGURE)_migration.py --rounds 1 --contexts 256
	$(FIGURE)_recovery.py --rounds 1 --context 256
	$(FIGURE)_predictions.py --hosts 2 --rtt 5 --rate 100mbit 20mbit --context 128
	$(FIGURE)_throughput.py --clients 1 4 --rounds 1 --tokens 16 --prompts 0
	$(FIGURE)_survival.py --seconds 4 --connections 1000
	$(FIGURE)_events.py --rounds 1 --seconds 4 --sessions 2

sim: $(VENV)/installed $(VENV)/group-test
	$(BIN)/python -P tests/sim/run.py $(SIM)

# Weeks of virtual time in a quarter of an hour: what each peer keeps must not grow.
sim-days: $(VENV)/installed $(VENV)/group-test
	$(BIN)/python -P tests/sim/days.py $(SIM_DAYS)

# Three real daemons for an hour, restarted one at a time: memory and descriptors must not grow.
soak: $(VENV)/installed $(VENV)/group-test
	$(BIN)/python -P tests/soak/run.py $(SOAK)

soak-short: $(VENV)/installed $(VENV)/group-test
	$(BIN)/python -P tests/soak/run.py $(SOAK_SHORT)

chaos: $(VENV)/installed $(VENV)/group-test
	$(BIN)/python -P tests/chaos/run.py $(CHAOS)

# Each kind of fault once.
chaos-short: $(VENV)/installed $(VENV)/group-test
	$(BIN)/python -P tests/chaos/run.py $(CHAOS_SHORT)

# Each way to compute an answer, with 20 prompts: SAME_ANSWERS chooses the backend. The short form has two prompts.
same-answers same-answers-short: ANY_WAY = tests/cluster/same_answers/test_any_way.py
same-answers-short: $(VENV)/installed $(VENV)/group-test
	$(BIN)/meshd pull smollm2:135m
	$(BIN)/pytest -m 'not slow' $(ANY_WAY)

same-answers: $(VENV)/installed $(VENV)/group-test
	$(BIN)/meshd pull smollm2:135m
	$(BIN)/pytest -s -m slow -k "$(SAME_ANSWERS)" $(ANY_WAY)

fuzz: $(VENV)/installed $(VENV)/group-test
	for target in tests/fuzz/fuzz_*.py; do echo "--- $$target"; $(BIN)/python -P "$$target" $(FUZZ) || exit; done

wheel: $(VENV)/installed
	rm -rf build dist
	$(PIP) wheel --no-deps --wheel-dir dist .
	rm -rf build

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/made:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer with venv was found: install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --upgrade "pip>=25.1"
	touch $@

$(VENV)/torch: $(VENV)/made
	$(PIP) install $(TORCH)
	touch $@

$(VENV)/installed: pyproject.toml $(VENV)/torch
	$(PIP) install --editable .
	touch $@

$(VENV)/group-%: pyproject.toml $(VENV)/installed
	$(PIP) install --group $*
	touch $@
