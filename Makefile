# flashcore: `make demo`, `make test`; `make help` lists the rest.
#
# Needs git, Python >= 3.10 with venv, a C++20 compiler and make. Everything else is installed into
# .venv here. The wheel is compiled once; a step runs again only when what it depends on changed.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
# auto uses an nvcc that is found, on insists on one, off builds for the CPU alone.
export FLASHCORE_CUDA ?= auto
# Empty leaves torch and JAX out; their tests are then skipped by name.
FRAMEWORKS ?= requirements/frameworks.txt
PYTEST_ARGS ?=

BIN := .venv/bin
PY := $(BIN)/python
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
WHEEL_SOURCES := $(shell find cpp cmake include python tests/cpp CMakeLists.txt pyproject.toml \
  -type f -not -name '*.pyc' 2>/dev/null)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo test test-cpp test-python test-abi sanitize aarch64 wheel venv lint format bench clean

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

# ---- the two commands ---------------------------------------------------------------------------

demo: build/.installed ## exact attention against standard attention over growing N; out/demo.png
	$(PY) -m benchmarks demo

test: test-cpp test-python test-abi sanitize ## build, then every test
	@echo "make test: all passed"

# ---- building -----------------------------------------------------------------------------------

venv: .venv/.ready
.venv/.ready: requirements/dev.txt requirements/gpu.txt
	$(PYTHON) scripts/check_python.py
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements/dev.txt $(if $(GPU),-r requirements/gpu.txt)
	touch $@

.venv/.frameworks: .venv/.ready $(FRAMEWORKS)
	$(PY) scripts/install_optional.py $(FRAMEWORKS)
	touch $@

# Changes only when the option does, so that the wheel is rebuilt then and not otherwise.
build/.options: FORCE
	@mkdir -p build
	@echo "FLASHCORE_CUDA=$(FLASHCORE_CUDA)" | cmp -s - $@ || \
	  echo "FLASHCORE_CUDA=$(FLASHCORE_CUDA)" > $@
FORCE:

wheel: build/.wheel ## dist/flashcore_attention-*.whl, its C++ tests in build/wheel, log in build/wheel.log
build/.wheel: .venv/.ready build/.options $(WHEEL_SOURCES)
	@mkdir -p build dist
	rm -f dist/flashcore_attention-*.whl
	@date +%s > build/.started
	$(PY) -m pip wheel . --verbose --no-build-isolation --no-deps --wheel-dir dist \
	  --config-settings=build-dir=build/wheel \
	  --config-settings=cmake.define.FLASHCORE_TESTS=ON 2>&1 | tee build/wheel.log
	@echo $$(( $$(date +%s) - $$(cat build/.started) )) > build/wheel.seconds
	touch $@

build/.installed: build/.wheel
	$(PY) -m pip install --quiet --force-reinstall --no-deps dist/flashcore_attention-*.whl
	touch $@

# ---- testing ------------------------------------------------------------------------------------

test-cpp: build/.wheel ## C++ tests of the build that made the wheel
	ctest --test-dir build/wheel --output-on-failure --output-junit $(CURDIR)/build/ctest.xml

test-python: build/.installed .venv/.frameworks ## Python tests and examples against the installed wheel
	$(PY) -m pytest tests/python --junitxml=build/pytest.xml $(PYTEST_ARGS)

test-abi: build/.wheel ## the same wheel on every other Python there is
	scripts/check_abi.sh dist/flashcore_attention-*.whl

sanitize: .venv/.ready ## C++ tests of the CPU core under address and undefined-behaviour sanitizers
	@mkdir -p build
	cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=Debug \
	  -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g1" -DFLASHCORE_CUDA=off -DFLASHCORE_TESTS=ON \
	  -DFLASHCORE_SANITIZE=address,undefined > build/sanitize.log
	cmake --build build/sanitize
	ctest --test-dir build/sanitize --output-on-failure --output-junit $(CURDIR)/build/sanitize.xml

aarch64: .venv/.ready ## C++ tests for AArch64 (NEON), emulated; needs g++-aarch64-linux-gnu and qemu-user
	@mkdir -p build
	cmake -S . -B build/aarch64 -G Ninja -DFLASHCORE_CUDA=off -DFLASHCORE_TESTS=ON \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	  "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu" > build/aarch64.log
	cmake --build build/aarch64
	ctest --test-dir build/aarch64 --output-on-failure

# ---- the rest -----------------------------------------------------------------------------------

lint: build/.installed ## formatting, ruff, mypy, weak symbols, machine paths, generated tables
	scripts/lint.sh

format: .venv/.ready ## formats C++ and Python in place
	scripts/format.sh

bench: build/.installed .venv/.ready ## CPU benchmark beside its peers; benchmarks/results/cpu
	$(PY) scripts/install_optional.py requirements/peers.txt
	$(PY) -m benchmarks cpu

clean: ## removes everything the Makefile made
	rm -rf .venv build dist out
