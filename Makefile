# `make demo` and `make test` are all that a fresh machine needs; see README.md.
PYTHON ?= python3
VENV ?= .venv
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
BIN := $(VENV)/bin

# Both workers, all three passes and the processes that tests start share compiled modules.
export PYTHONDONTWRITEBYTECODE :=

# Shows what is downloaded, without notices of new versions of pip.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar on

.PHONY: env env-cuda demo test test-slow test-exhaustive test-3.12 oracles onnx check lock clean

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements/py$(VERSION).txt
	@echo "Installing into $(VENV): one to three minutes, downloads about 350 MB."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r requirements/py$(VERSION).txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

demo: env
	@echo "Training a head on a frozen ResNet-20: about 20 seconds on two CPU cores."
	$(BIN)/python -m finetune_jax.main --config=configs/resnet_head.py

# CUDA as wheels, 12 or 13, beside the rest of the environment. The last line shows what
# jax computes on.
CUDA ?= 13

env-cuda: env
	$(BIN)/python -m pip install --quiet --require-hashes \
	  -r requirements/cuda$(CUDA)-py$(VERSION).txt
	$(BIN)/python -c "import jax; print(jax.devices())"

# Tests spend most of their time in the compiler. Those that compare neither bits nor
# costs are compiled without optimisation, and with the emitters that compile fastest.
# Skipped tests are listed with their reasons.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal -q -rs
QUICK_FLAGS := --xla_backend_optimization_level=0
# The jax of the other lock has no such flag.
ifeq ($(VERSION),3.11)
QUICK_FLAGS += --xla_cpu_use_fusion_emitters=false
endif
QUICKLY := TEST_XLA_FLAGS="$(QUICK_FLAGS)"

test: env
	@echo "The fast tests: about five minutes on two CPU cores."
	$(QUICKLY) $(PYTEST) -m "not slow and not bits and not exhaustive"

test-slow: env
	$(QUICKLY) $(PYTEST) -m "slow and not bits and not exhaustive" tests
	$(PYTEST) -m "bits and not exhaustive" tests

# Outside CI: all other cases of what CI shows with one of each kind. It takes hours.
test-exhaustive: env
	$(QUICKLY) $(PYTEST) -m "exhaustive and not bits" tests
	$(PYTEST) -m "exhaustive and bits" tests

# torch, torchvision, timm and transformers, which some tests compare with; without them
# those tests skip, saying so.
oracles: env
	$(BIN)/python -m pip install --quiet torch==2.13.0 tokenizers regex typer
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/oracles.txt

# What `--formats=onnx` converts with; its pins clash with those of the main environment.
onnx: .venv-onnx/.installed

.venv-onnx/.installed: requirements/onnx.txt
	$(PYTHON) -m venv .venv-onnx
	.venv-onnx/bin/python -m pip install --quiet -r requirements/onnx.txt
	touch $@

# The same on the other Python that is supported, in an environment of its own.
test-3.12:
	$(MAKE) VENV=.venv-3.12 PYTHON=python3.12 test test-slow

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Renews the locks: versions and hashes, no index address.
lock:
	uv pip compile pyproject.toml --extra dev requirements/build.in \
	  --generate-hashes --no-emit-index-url --quiet --python-version 3.11 \
	  --no-header -o requirements/py3.11.txt
	uv pip compile pyproject.toml --extra dev requirements/build.in \
	  --generate-hashes --no-emit-index-url --quiet --python-version 3.12 \
	  --no-header -o requirements/py3.12.txt
	for cuda in 12 13; do for version in 3.11 3.12; do \
	  echo "jax[cuda$$cuda]" | uv pip compile - --constraint requirements/py$$version.txt \
	    --generate-hashes --no-emit-index-url --no-emit-find-links --quiet \
	    --python-version $$version --no-header \
	    -o requirements/cuda$$cuda-py$$version.txt || exit 1; \
	done; done

clean:
	rm -rf .venv .venv-3.12 .venv-onnx .pytest_cache .ruff_cache
