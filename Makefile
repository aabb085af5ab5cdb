# Everything runs in .venv, made on first use. PYTHON picks the interpreter that makes it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check lint types kernels gpu clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch .venv/ready

demo: .venv/ready  ## draw 16 images with the bundled model into samples.png
	$(BIN)/ddpm-fast sample

test: .venv/ready  ## the tests, on whatever machine this is
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

check: lint types test  ## what CI runs

kernels: .venv/ready  ## compile every kernel for sm_80 to sm_120 and read the machine code; needs no GPU
	$(BIN)/python -m benchmarks.compile_kernels

gpu: .venv/ready  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -n 0 -m gpu

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
