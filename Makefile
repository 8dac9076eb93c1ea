# `make demo` and `make test` do all set-up on a fresh machine (Python 3.11, g++, CMake, pip).
#
#   TORCH   what to install as PyTorch       make test TORCH="torch==2.12.*"
#   VENV    the virtual environment to use   make test VENV=/path/to/venv
#   OUTPUT  where the demo writes            make demo OUTPUT=outputs/mine
#   SEED    seed of the demo                 make demo SEED=1

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUTPUT ?= outputs/demo
SEED ?= 0
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-amx test-triton test-cuda test-all bench lint format seeds clean help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -8
	@echo "targets: demo test test-amx test-triton test-cuda test-all bench lint format seeds clean"

# A PyTorch that is already in the environment is kept.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)" \
		|| $(BIN)/python -m pip install "$(TORCH)"
	@touch $@

$(VENV)/.ready: $(VENV)/.torch $(NATIVE)
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/driftar train --output $(OUTPUT) --dataset digits --seed $(SEED)
	$(BIN)/driftar sample --output $(OUTPUT)
	$(BIN)/driftar report --output $(OUTPUT)

# The same for seeds 0, 1 and 2, and their common table.
seeds: $(VENV)/.ready
	for seed in 0 1 2; do $(MAKE) demo OUTPUT=outputs/seed_$$seed SEED=$$seed || exit 1; done
	$(BIN)/driftar report outputs/seed_0 outputs/seed_1 outputs/seed_2 --output outputs/seeds

test: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not slow"

# bf16 attention on AMX. Where the processor has none an emulator carries out its instructions; it
# handles the signal that pytest's own fault handler would take.
AMX_EMULATOR := $(abspath build/libamx_emulator.so)
PRELOAD_AMX = $(if $(shell grep -m1 -o amx_bf16 /proc/cpuinfo),,LD_PRELOAD=$(AMX_EMULATOR))

$(AMX_EMULATOR): tests/amx_emulator/emulator.cpp
	mkdir -p $(@D)
	$(CXX) -std=c++20 -O3 -march=native -Wall -Wextra -shared -fPIC -o $@ $<

test-amx: $(VENV)/.ready $(AMX_EMULATOR)
	@grep -qm1 avx512_bf16 /proc/cpuinfo || \
		{ echo "the AMX kernels also use AVX512-BF16, which this processor does not have"; exit 1; }
	$(PRELOAD_AMX) DRIFTAR_KERNELS_ISA=amx $(BIN)/python -m pytest -q -n auto \
		-p no:faulthandler -k "attention_bf16 or (cpu and bf16)" $(wildcard tests/driftar_kernels/test_attention*.py)

# Triton comes with CUDA builds of PyTorch; elsewhere it is installed here.
TRITON ?= triton==3.7.1

$(VENV)/.triton: $(VENV)/.ready
	$(BIN)/python -c "import triton" || $(BIN)/python -m pip install "$(TRITON)"
	@touch $@

test-triton: $(VENV)/.triton
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto tests/driftar_kernels tests/benchmarks -k triton

# The operators' own tests, with the CUDA kernels behind them on an emulator: of a GPU of capability
# 8.0, then attention of 16 bits on one of 9.0, which has a kernel of its own.
CASES ?= cuda
EMULATED := $(foreach op,attention chain commit cuda_emulated drift prior tree,\
	$(wildcard tests/driftar_kernels/test_$(op)*.py)) tests/benchmarks/test_gpu_record.py

test-cuda: $(VENV)/.ready
	DRIFTAR_CUDA_EMULATED=1 $(BIN)/python -m pytest -q -n auto -k "$(CASES)" $(EMULATED)
	DRIFTAR_CUDA_EMULATED=1 DRIFTAR_CUDA_EMULATED_CAPABILITY=90 $(BIN)/python -m pytest -q -n auto \
		-k "($(CASES)) and (bf16 or fp16)" $(wildcard tests/driftar_kernels/test_attention*.py)

test-all: $(VENV)/.ready
	$(BIN)/python -m pytest

# Nothing else should run meanwhile. Results: benchmarks/results/<machine>/.
bench: $(VENV)/.ready
	mkdir -p build
	$(BIN)/python -m pytest benchmarks/ --benchmark-quiet --benchmark-json=build/benchmarks.json
	$(BIN)/python -m benchmarks.report

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/pre-commit run clang-format --all-files

clean:
	rm -rf build driftar_kernels/_C*.so *.egg-info $(VENV)/.ready
