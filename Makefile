# Everything people and CI call. `make demo` and `make test` build the environment themselves when it is missing.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PROFILE := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo gpu || echo cpu)
STAMP := $(VENV)/.fp8pipe-$(PROFILE)

.PHONY: setup demo sabotage check fix test test-long bench gpu-check lock clean

setup: $(STAMP)

$(STAMP): locks/$(PROFILE).txt pyproject.toml scripts/setup
	@PYTHON="$(PYTHON)" scripts/setup "$(PROFILE)" "$(VENV)"
	@touch $@

demo: setup
	@$(BIN)/fp8pipe demo

sabotage: setup
	@$(BIN)/fp8pipe demo --sabotage

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/test_layering.py tests/test_fields.py tests/test_architecture_page.py tests/config

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: check
	$(BIN)/pytest -n 2 --dist loadfile -m "not long and not gpu"

test-long: check
	FP8PIPE_LONG=1 $(BIN)/pytest -m "not gpu"

bench: setup
	$(BIN)/python -m benchmarks

# On a machine that has Python, torch with CUDA, transformers and numba; nothing is set up. PYTHON names the interpreter.
gpu-check:
	@PYTHON="$(firstword $(shell command -v $(PYTHON) python3))" scripts/gpu_check $(GPU_CHECK)

# torch's CPU build, as in scripts/setup: pip's find-links folder where one is set, else PyTorch's own index.
TORCH = $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)

# The lock is a requirements file without index or folder, so that it names no machine.
lock: setup
	$(BIN)/uv pip compile pyproject.toml $(TORCH) --extra cpu --group dev --override locks/cpu-overrides.txt \
	  --no-emit-index-url --no-emit-find-links --python-version 3.11 -o locks/cpu.txt
	env -u UV_FIND_LINKS $(BIN)/uv pip compile pyproject.toml --extra gpu --group dev \
	  --no-emit-index-url --no-emit-find-links --python-version 3.11 -o locks/gpu.txt

clean:
	rm -rf $(VENV) fp8pipe-demo
