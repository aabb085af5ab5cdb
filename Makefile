# Everything runs in .venv, made on first use. PYTHON picks the interpreter that makes it.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= $(BIN)/python
KIND = $(shell $(RUN) -c "import torch; print('gpu' if torch.cuda.is_available() else 'cpu')" 2>/dev/null)

.PHONY: demo test avx2 oldest newest check lint types kernels bench tables gpu clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch .venv/ready

demo: .venv/ready  ## draw 16 images with the bundled model into samples.png
	$(BIN)/ddpm-fast sample

test: .venv/ready  ## the tests, on whatever machine this is
	$(BIN)/python -m pytest

avx2: .venv/ready  ## the tests of floating point as on a processor without AVX-512 and AMX
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -m numeric

# Without the pins of what is under test; PyTorch's default build for Linux, several GB.
oldest:  ## the tests with the oldest torch and triton that pyproject.toml accepts
	$(PYTHON) -m venv .venv-oldest
	sed '/^torch==/d; /^triton==/d' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install -q -c .venv-oldest/constraints.txt -e '.[test]' torch==2.10.0 triton==3.6.0
	.venv-oldest/bin/python -m pytest

newest:  ## the tests with what `pip install ddpm-fast` takes today: the newest releases, without our constraints
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install -q --upgrade --upgrade-strategy eager -e '.[test]'
	.venv-newest/bin/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

check: lint types test  ## what CI runs

kernels: .venv/ready  ## compile every kernel for sm_80 to sm_120 and read the machine code; needs no GPU
	$(BIN)/python -m benchmarks.compile_kernels

bench: $(if $(filter $(BIN)/python,$(RUN)),.venv/ready)  ## time every provider on this machine, write the pages' tables
	$(RUN) -m ddpm_fast bench cifar10 --batch-size 1 4 16 --budget 7200 --out benchmarks/results/cifar10-$(or $(KIND),cpu).json
	$(RUN) -m benchmarks.tables

tables: $(if $(filter $(BIN)/python,$(RUN)),.venv/ready)  ## the tables of README.md and docs/performance.md from the JSON that is there
	$(RUN) -m benchmarks.tables

# What needs a GPU, in parts: each stands alone, keeps what it has measured if it is cut short, and is stopped after
# LIMIT seconds; later parts run whatever became of earlier ones. On a machine without a network: make gpu
# RUN=python3, with what pyproject.toml names installed there; what is missing is named, and what needs it skipped.
GPU_PARTS := gpu-test gpu-speed gpu-tiles gpu-rival gpu-sanitize
RESULTS ?= benchmarks/results
LIMIT ?= 540
JOBS ?= $(shell n=$$(nproc 2> /dev/null || echo 4); echo $$((n < 12 ? n : 12)))
WITHIN := timeout -k 10 $(LIMIT)
SANITIZED := tests/test_sampler_step_kernel.py tests/test_norm_act_kernel.py tests/test_conv_step.py tests/test_conv_kernel.py
NOT_SANITIZED := larger or any_shape or real_sizes or thousand
.PHONY: gpu-there $(GPU_PARTS)

gpu: gpu-there  ## with a CUDA device: its tests, the engine's speed, its tiles, torch.compile beside it, the sanitizer
	@failed=; for part in $(GPU_PARTS); do $(MAKE) --no-print-directory $$part || failed="$$failed $$part"; done; \
	if [ -n "$$failed" ]; then echo "not all well:$$failed" >&2; exit 1; fi

gpu-there: $(if $(filter $(BIN)/python,$(RUN)),.venv/ready)
	@$(RUN) -c "import torch; raise SystemExit(not torch.cuda.is_available())" \
	  || { echo "torch finds no CUDA GPU here, which this needs" >&2; exit 2; }
	@mkdir -p $(RESULTS)

# In JOBS processes, for most of the time goes into compiling kernels; a test that hangs ends its process, not the run.
gpu-test: gpu-there  ## the tests marked gpu
	$(WITHIN) $(RUN) -m pytest -m gpu -n $(JOBS) --dist load --junitxml=$(RESULTS)/gpu-tests.xml \
	  -o faulthandler_timeout=200 -o faulthandler_exit_on_timeout=true

gpu-speed: gpu-there  ## images/s and every kernel beside its roof, in bfloat16 and float32
	$(WITHIN) sh -c 'bad=0; \
	  $(RUN) -m benchmarks.warm || bad=1; \
	  $(RUN) -m benchmarks.engine --out $(RESULTS) || bad=1; \
	  $(RUN) -m benchmarks.warm --dtype float32 --batch 16 || bad=1; \
	  $(RUN) -m benchmarks.engine --dtype float32 --batch 16 --out $(RESULTS) || bad=1; \
	  $(RUN) -m ddpm_fast profile cifar10 --batch-size 64 --dtype bfloat16 --html $(RESULTS)/profile.html || bad=1; exit $$bad'

gpu-tiles: gpu-there  ## which tile each convolution should have, at a large batch and at batch 1
	$(WITHIN) sh -c '$(RUN) -m benchmarks.tiles --out $(RESULTS); $(RUN) -m benchmarks.tiles --batch 1 --out $(RESULTS)'

gpu-rival: gpu-there  ## beside diffusers under torch.compile(max-autotune), which takes minutes for each batch size
	$(WITHIN) sh -c '$(RUN) -m benchmarks.warm --batch 64 --batch 1 --batch 256 --batch 16; \
	  $(RUN) -m benchmarks.engine --compiled --batch 64 --batch 1 --batch 256 --batch 16 --out $(RESULTS)'

# Without the allocator's pool, so that memcheck sees where each tensor ends. torch's kernels are not looked at.
gpu-sanitize: gpu-there  ## memcheck and racecheck over the kernels' tests
	@if ! command -v compute-sanitizer > /dev/null; then \
	  echo "compute-sanitizer is not installed: memcheck and racecheck were NOT run"; exit 0; fi; \
	bad=0; for tool in memcheck racecheck; do echo "$$tool, into $(RESULTS)/$$tool.txt"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 $$(($(LIMIT) / 2)) compute-sanitizer --tool $$tool \
	    --error-exitcode 1 --kernel-name-exclude kns=at6native,kns=at::native --log-file $(RESULTS)/$$tool.txt \
	    $(RUN) -m pytest -n 0 -m gpu -q -k "not ($(NOT_SANITIZED))" $(SANITIZED) || bad=1; \
	  tail -n 3 $(RESULTS)/$$tool.txt; done; exit $$bad

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
