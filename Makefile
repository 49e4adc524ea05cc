# Everything a person or a machine does here. `make` alone lists it.
PYTHON ?= python3
# Where the CPU build of torch is found; `make setup TORCH_INDEX=` takes PyPI's own build (CUDA on Linux).
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
# Arguments of the command behind demo, serve, test, soak, kill-run and bench-scheduler: `make test ARGS="-k preemption"`.
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STUBS := .venv/stubs

stubs = $(BIN)/python -m grpc_tools.protoc -I. --plugin=$(BIN)/protoc-gen-mypy --plugin=$(BIN)/protoc-gen-mypy_grpc \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) protos/*.proto

# Where it is set, each of a thousand processes would compile all that it imports: seconds, where torch is among it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup protos check check-style check-mypy check-pyright check-protos test test-kernels test-compile test-clients clients hostile-http soak kill-run demo serve up bench bench-gateway bench-kernels bench-quality bench-sampling bench-scheduler bench-split bench-streaming gpu-check
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | sort | expand -t 18

setup: .venv/.kernels ## make .venv with everything at its pinned version, and the C++ kernels (once; then offline)

# torch comes alone: its index is asked for nothing else, and what it holds outranks PyPI's CUDA build of the same version.
# Which of them it will be is said before it is downloaded. What is imported is compiled then: all would take a minute.
torch = --no-deps -c constraints.txt $(if $(TORCH_INDEX),--retries 2 --extra-index-url $(TORCH_INDEX)) torch

.venv/.ok: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=...")'
	@echo "Making .venv: about 1.3 GB, a minute or two; more where torch is the build for CUDA."
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt setuptools
	@$(PIP) install -qq --dry-run --ignore-installed --report - $(torch) \
		| TORCH_INDEX="$(TORCH_INDEX)" $(BIN)/python tests/house/torch_build.py
	$(PIP) install -q --no-compile $(torch)
	$(PIP) install -q --no-compile --no-build-isolation -c constraints.txt -e ".[dev]"
	$(PIP) check
	@touch $@

# Without a compiler it says so, and torch does the work, slower.
.venv/.kernels: .venv/.ok executor/native/build.py $(wildcard executor/native/csrc/*)
	@echo "Compiling the C++ kernels: about a minute."
	@$(BIN)/python -m executor.native.build
	@touch $@

protos: setup ## write the stubs in protos/ anew
	$(call stubs,.)

# In parts, so that `make -j check` has several cores at work.
check: check-style check-mypy check-pyright check-protos ## format, lint, types, imports, protos

check-style: .venv/.ok
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/buf lint

check-mypy: .venv/.ok
	$(BIN)/mypy

check-pyright: .venv/.ok
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

# The stubs are written into a folder of its own: those in protos/ must be the same.
check-protos: .venv/.ok
	@rm -rf $(STUBS) && mkdir $(STUBS)
	$(call stubs,$(STUBS))
	@cd $(STUBS) && for stub in protos/*; do diff -u $(CURDIR)/$$stub $$stub || { echo "$$stub is stale: make protos"; exit 1; }; done

test: setup $(if $(ARGS),,clients) ## run every test; ARGS="-k preemption" some
	$(BIN)/python -m tests.run_all $(ARGS)

test-kernels: setup ## of these, the GPU's: kernels in Triton's interpreter and what drives them
	$(BIN)/python -m pytest tests/gpu --ignore tests/gpu/test_compile.py $(ARGS)

test-compile: setup ## of these, that every kernel compiles for the GPUs it is for
	$(BIN)/python -m pytest tests/gpu/test_compile.py $(ARGS)

test-clients: .venv-clients/.more .venv-triton/.ok .venv-litellm/.ok ## clients of others against live servers, also those that `make test` has not; ARGS="-k envoy"
	.venv-clients/bin/python -m pytest tests/clients $(ARGS)

hostile-http: .venv-clients/.more ## ask a live gateway what nobody would, for ten minutes; ARGS="--minutes 1"
	.venv-clients/bin/python -m tests.clients.hostile_http $(ARGS)

clients: .venv-clients/.ok .venv-triton/.ok

# Every list is whole, so nothing is resolved, and they are made while .venv is.
into = @echo "Making .venv-$(1) for the clients of tests/clients/$(2).txt."; \
	.venv-$(1)/bin/python -m pip --disable-pip-version-check install -q --no-compile --no-deps -r tests/clients/$(2).txt

# Beside .venv, whose packages it sees and none of which it changes.
.venv-clients/.ok: tests/clients/requirements.txt
	$(PYTHON) -m venv --clear .venv-clients
	@echo "import site, sys; site.addsitedir('$(CURDIR)/.venv/lib/python%d.%d/site-packages' % sys.version_info[:2])" \
		> $$(echo .venv-clients/lib/python3*/site-packages)/pagewire.pth
	$(call into,clients,requirements)
	@touch $@

.venv-clients/.more: .venv-clients/.ok .venv/.kernels tests/clients/more.txt
	$(call into,clients,more)
	.venv-clients/bin/python -m pip --disable-pip-version-check check
	@touch $@

# Those that want other versions of what is in .venv, each alone; the tests run them as programs.
.venv-litellm/.ok .venv-triton/.ok: .venv-%/.ok: tests/clients/%.txt
	$(PYTHON) -m venv --clear .venv-$*
	$(call into,$*,$*)
	@touch $@

soak: setup ## search for faults that hurt, an hour; ARGS="--minutes 600 --first 2000000"
	$(BIN)/python -m tests.faults.simulate --minutes 60 --first 100000 $(ARGS)

kill-run: setup ## kill real processes a thousand times while streams are read; ARGS="--kills 100 --overlapping"
	$(BIN)/python -m tests.faults.kill_run --out kill-run $(ARGS)

demo: setup ## watch a real model answer through a scheduler and an executor
	$(BIN)/python -m services demo $(ARGS)

serve: setup ## the same, staying up; prints the address and a request to copy
	$(BIN)/python -m services serve $(ARGS)

up: ## build the images and start them with Docker Compose
	$(COMPOSE) up --build $(ARGS)

bench-scheduler: setup ## steps a second the scheduler can sustain, and what a plan costs
	$(BIN)/python -m tests.benchmarks.bench_scheduler $(ARGS)

bench: setup ## serve fixed workloads and measure; beside others with ARGS="--peers llama-bf16,vllm-bf16"
	$(BIN)/python -m tests.benchmarks.bench_serving $(ARGS)

bench-gateway: setup ## what HTTP costs beside gRPC: the same streams over both, in turns
	$(BIN)/python -m tests.benchmarks.bench_gateway $(ARGS)

bench-kernels: setup ## every kernel's time against the machine's memory and matrix rates
	$(BIN)/python -m tests.benchmarks.bench_kernels $(ARGS)

bench-quality: setup ## what fewer bits do to a model's answers
	$(BIN)/python -m tests.benchmarks.quality $(ARGS)

bench-sampling: setup ## what sampling controls and log-probabilities cost, and plain batches that have none
	$(BIN)/python -m tests.benchmarks.bench_sampling $(ARGS)

bench-split: setup ## what the border between scheduler and executor costs a step
	$(BIN)/python -m tests.benchmarks.bench_split $(ARGS)

gpu-check: setup ## on a machine with a GPU: check and measure everything there, in 8 minutes; ARGS="--peers"
	$(BIN)/python -m tests.gpu.check --budget 480 --out build/gpu-check $(ARGS)

bench-streaming: setup ## what a token costs the scheduler's process; ARGS="--minutes 5" watches memory
	$(BIN)/python -m tests.benchmarks.bench_streaming $(ARGS)
