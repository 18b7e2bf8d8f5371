# `make help` lists the targets.

PYTHON ?= python3
PYTHON312 ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
# Installs the programs that jllama is compared with, each in a cached environment outside the
# checkout. PyPI's torch for Linux brings gigabytes of CUDA; set TORCH_INDEX= to get it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PEER := $(BIN)/python tests/peers/environment.py --torch-index '$(TORCH_INDEX)'
LIBTPU := $(VENV)/libtpu/libtpu/libtpu.so
# glibc's huge pages save a tenth of the step, which else goes into page faults on temporary buffers.
TRAIN := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python train.py
EXTRAS := cuda tpu plan gcs s3 serve beam dev

PIP := $(BIN)/python -m pip --disable-pip-version-check
# One lock serves every Python from 3.11 on. Locked versions stay, unless UPGRADE=--upgrade.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
	--no-annotate --custom-compile-command "make lock" pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help install train long-context test test-peers bench bench-tpu plan plans api lint format lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.dev  ## make .venv with the locked requirements, this package and the development tools
	@echo "$(VENV) is ready"

train: $(VENV)/.default  ## train the default recipe on real text and print a sample
	$(TRAIN) --config configs/train/tiny.yaml

long-context: $(VENV)/.default  ## extend a small model's context, and draw perplexity against length
	$(TRAIN) --config configs/train/tiny-256.yaml
	$(TRAIN) --config configs/train/extend-pi.yaml
	$(TRAIN) --config configs/train/extend-theta.yaml
	$(BIN)/jllama evaluate perplexity --data runs/tiny-256 --out runs/long-context \
		--lengths 128,256,512,1024,2048,4096 --stride 64 --windows 32 \
		--model "trained at 256=runs/tiny-256" --rope 'none, {kind: ntk, alpha: 4}, adaptive, yarn' \
		--model "fine-tuned at 1,024 with PI=runs/tiny-1024-pi" --rope 'model, {kind: ntk, alpha: 4}, {kind: ntk, alpha: 16}' \
		--model "fine-tuned at 1,024 with theta 1e6=runs/tiny-1024-theta"

test: $(VENV)/.dev  ## run the tests on the CPU
	@# One worker more than cores: a worker waits for its subprocesses a quarter of the time.
	@# If the TPU compiler cannot be installed, the tests that compile for TPUs skip.
	@$(MAKE) --no-print-directory $(VENV)/.plan || echo "no TPU compiler: some tests will skip" >&2
	@# XLA_FLAGS, set or empty, keeps LLVM's optimisations (tests/conftest.py).
	if [ -f $(LIBTPU) ]; then export TPU_LIBRARY_PATH=$(abspath $(LIBTPU)); fi; \
	pytest="$(BIN)/python -m pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --maxprocesses 8 --dist worksteal"; \
	$$pytest -m 'not optimized'; status=$$?; \
	XLA_FLAGS="$$XLA_FLAGS" $$pytest -m optimized && exit $$status

test-peers: $(VENV)/.dev  ## check exactness against transformers, PEFT, llama.cpp, sentencepiece and tiktoken
	@# The first run installs them, llama.cpp from source, in about ten minutes.
	transformers="$$($(PEER) transformers)" && transformers4="$$($(PEER) transformers4)" && \
	llama_cpp="$$($(PEER) llama-cpp)" && JLLAMA_PEER_TRANSFORMERS="$$transformers" \
	JLLAMA_PEER_TRANSFORMERS4="$$transformers4" JLLAMA_PEER_LLAMA_CPP="$$llama_cpp" \
	XLA_FLAGS="$$XLA_FLAGS" $(BIN)/python -m pytest -n 2 --dist loadfile tests/peers

bench: $(VENV)/.default  ## compare the train step with PyTorch (an hour on two quiet cores)
	peer="$$($(PEER) transformers)" && $(BIN)/python -m benchmarks.compare --peers "$$peer"

bench-tpu: $(VENV)/.default  ## write docs/tpu.md: compare the step on TPU slices with MaxText's (an hour on two cores)
	@# MaxText needs Python 3.12; its libtpu compiles both programs.
	peer="$$($(PYTHON312) tests/peers/environment.py maxtext)" && \
	$(BIN)/python -m benchmarks.tpu --peer "$$peer" docs/tpu.md

plan: $(VENV)/.default $(VENV)/.plan  ## install the TPU compiler for jllama plan, outside the packages of .venv
	@echo "$(BIN)/jllama plan is ready"

plans: plan  ## write docs/plans.md: compile 7B to 405B for TPU slices (half an hour on two cores)
	$(BIN)/python -m benchmarks.plans docs/plans.md

api: $(VENV)/.dev  ## write the API reference, the docstrings as HTML, to build/api
	JAX_PLATFORMS=cpu $(BIN)/python docs/api.py build/api

lint: $(VENV)/.dev  ## check format, rules, the lock, and that every extra resolves over it
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(resolver); \
	for lock in requirements.txt requirements-dev.txt; do \
		echo "lock: $$lock"; cp $$lock $(VENV)/$$lock; \
		extra=; [ $$lock = requirements.txt ] || extra="--extra dev"; \
		$(COMPILE) $$extra --output-file $(VENV)/$$lock && diff $$lock $(VENV)/$$lock || \
			{ echo "$$lock is not what pyproject.toml asks for: run make lock" >&2; exit 1; }; \
	done; \
	for extra in $(EXTRAS); do \
		echo "extra: $$extra"; \
		$(COMPILE) --extra $$extra --constraints requirements.txt --output-file /dev/null || exit 1; \
	done

format: $(VENV)/.dev  ## format the sources
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(VENV)/.dev  ## renew requirements*.txt (UPGRADE=--upgrade takes the newest versions)
	@# All extras resolve at once, so that each of them installs over the default lock.
	@$(resolver); cp requirements-dev.txt $(VENV)/all.txt && \
	$(COMPILE) $(UPGRADE) --all-extras --output-file $(VENV)/all.txt && \
	$(COMPILE) --constraints $(VENV)/all.txt --output-file requirements.txt && \
	$(COMPILE) --constraints $(VENV)/all.txt --extra dev --output-file requirements-dev.txt

clean:  ## remove .venv, caches and build products; runs and prepared data stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# uv resolves from metadata, without downloading gigabytes of CUDA. It does not read pip's
# configuration, so this passes pip's index on.
define resolver
	index="$${PIP_INDEX_URL:-$$($(PIP) config get global.index-url 2>/dev/null)}"; \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi
endef

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "error: $(PYTHON) not found; make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) -V) is too old: jllama needs 3.11 or newer; make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment (Debian: apt install python3-venv)" >&2; exit 1; }

# A stamp is renewed only when the files change from which it was installed.
$(VENV)/.default: requirements.txt pyproject.toml | $(BIN)/python
	@echo "installing requirements.txt into $(VENV), a minute or more ..."
	$(PIP) install --quiet -r requirements.txt
	$(PIP) install --quiet --no-deps --editable .
	@touch $@

# libtpu is not installed as a package, because every run on a CPU would then look for TPUs and
# print warnings. The version is the one that the installed jax names for its extra `tpu`.
$(VENV)/.plan: $(VENV)/.default
	@echo "installing libtpu, the TPU compiler, into $(VENV)/libtpu ..."
	$(PIP) install --quiet --upgrade --no-deps --target $(VENV)/libtpu "$$($(BIN)/python -c \
		'import importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))')"
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.default
	@echo "installing requirements-dev.txt into $(VENV) ..."
	$(PIP) install --quiet -r requirements-dev.txt
	@touch $@

$(VENV)/.cuda: $(VENV)/.default
	$(PIP) install --quiet -c requirements.txt --editable '.[cuda]'
	@touch $@
