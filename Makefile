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

# A lock is a requirements file without index or folder, so that it names no machine. The flows' own environment has the
# versions of the one environment, which uv prefers when it finds them in the output, but the newest Prefect.
COMPILE = $(BIN)/uv pip compile pyproject.toml --no-emit-index-url --no-emit-find-links --python-version 3.11
ON_CPU = $(TORCH) --override locks/cpu-overrides.txt

lock: setup
	$(COMPILE) $(ON_CPU) --extra cpu --group dev -o locks/cpu.txt
	env -u UV_FIND_LINKS $(COMPILE) --extra gpu --group dev -o locks/gpu.txt
	cp locks/cpu.txt locks/flows-cpu.txt
	$(COMPILE) $(ON_CPU) --extra flows --upgrade-package prefect -o locks/flows-cpu.txt
	cp locks/gpu.txt locks/flows-gpu.txt
	env -u UV_FIND_LINKS $(COMPILE) --extra flows --upgrade-package prefect -o locks/flows-gpu.txt

clean:
	rm -rf $(VENV) fp8pipe-demo
