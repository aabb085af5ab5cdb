# Everything runs in .venv, made on first use. PYTHON picks the interpreter that makes it.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= $(BIN)/python
KIND = $(shell $(RUN) -c "import torch; print('gpu' if torch.cuda.is_available() else 'cpu')" 2>/dev/null)

.PHONY: demo test oldest check lint types kernels bench tables gpu clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch .venv/ready

demo: .venv/ready  ## draw 16 images with the bundled model into samples.png
	$(BIN)/ddpm-fast sample

test: .venv/ready  ## the tests, on whatever machine this is
	$(BIN)/python -m pytest

# Without the pins of what is under test; PyTorch's default build for Linux, several GB.
oldest:  ## the tests with the oldest torch and triton that pyproject.toml accepts
	$(PYTHON) -m venv .venv-oldest
	sed '/^torch==/d; /^triton==/d' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install -q -c .venv-oldest/constraints.txt -e '.[test]' torch==2.10.0 triton==3.6.0
	.venv-oldest/bin/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

check: lint types test  ## what CI runs

kernels: .venv/ready  ## compile every kernel for sm_80 to sm_120 and read the machine code; needs no GPU
	$(BIN)/python -m benchmarks.compile_kernels

bench: $(if $(filter $(BIN)/python,$(RUN)),.venv/ready)  ## time every provider on this machine, write the pages' tables
	$(RUN) -m ddpm_fast bench cifar10 --batch 1 4 16 --out benchmarks/results/cifar10-$(or $(KIND),cpu).json
	$(RUN) -m benchmarks.tables

tables: $(if $(filter $(BIN)/python,$(RUN)),.venv/ready)  ## the tables of README.md and docs/performance.md from the JSON that is there
	$(RUN) -m benchmarks.tables

# On a machine without a network: make gpu RUN=python3, with what pyproject.toml names installed there.
SANITIZED := tests/test_sampler_step_kernel.py tests/test_norm_act_kernel.py tests/test_conv_kernel.py tests/test_conv_step.py
gpu: $(if $(filter $(BIN)/python,$(RUN)),.venv/ready)  ## with a CUDA device: its tests, the sanitizer, the engine's speed
	$(RUN) -m pytest -n 0 -m gpu
	@if command -v compute-sanitizer > /dev/null; then for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(RUN) -m pytest -n 0 -m gpu -x -q $(SANITIZED) || exit 1; \
	done; else echo "compute-sanitizer is not installed: memcheck and racecheck were NOT run"; fi
	$(RUN) -m benchmarks.engine --out benchmarks/results
	$(RUN) -m benchmarks.engine --dtype float32 --no-compiled --batch 16 --out benchmarks/results

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
