# Needs Python 3.11 or 3.12 and make, nothing else.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN = $(VENV)/bin
RUN = runs/quickstart
PROMPT ?= def read_lines(path):
WORKERS ?= 2
# Of its own: with libtpu beside it, JAX looks for a TPU whenever it starts. One for each JAX that is
# asked for: make look-ahead JAX=0.10, or JAX=0.11, which needs Python 3.12.
JAX ?=
TPU_VENV ?= .venv-tpu$(if $(JAX),-$(JAX))
TPU_PYTHON = $(if $(filter 0.11,$(JAX)),python3.12,$(PYTHON))
HF_VENV ?= .venv-hf

# An environment whose Python is none of these, or gone, is made anew.
STALE := $(shell test ! -e $(VENV) || $(VENV)/bin/python -c 'import sys; \
  sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || echo stale)

.PHONY: quickstart test test-near test-slow same-numbers test-slow-smoke test-hf look-ahead lint venv clean
ifneq ($(STALE),)
.PHONY: $(VENV)/bin/python $(VENV)/installed $(VENV)/installed-dev
endif

quickstart: $(VENV)/installed
	$(BIN)/python -m launch.train --config=configs/quickstart.py --workdir=$(RUN)
	@echo && $(BIN)/python -m launch.evaluate --workdir=$(RUN)
	@echo && echo "A sample:" && $(BIN)/python -m launch.generate --workdir=$(RUN) --prompt='$(PROMPT)' --max_tokens=96
	@echo
	@echo "Everything lies in $(RUN): metrics.jsonl, eval.json, samples.md, config.json, checkpoints/"
	@echo "  go on:    $(BIN)/python -m launch.train --config=configs/quickstart.py --workdir=$(RUN) --config.train.num_steps=2400 --config.optim.schedule.earlier_ends=1500"
	@echo "  score:    $(BIN)/python -m launch.evaluate --workdir=$(RUN)"
	@echo "  write:    $(BIN)/python -m launch.generate --workdir=$(RUN) --prompt='class Node:'"

# Each worker has files of its own, and what they compile, until it takes from another.
test: lint
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m 'not slow'

# Lint, types and the tests that what differs from SINCE can reach, for at most four minutes.
SINCE ?= main
test-near: UNTIL := $(shell expr $$(date +%s) + 215)
test-near: lint
	$(BIN)/python -m tests.near --since=$(SINCE) --workers=$(WORKERS) --until=$(UNTIL)

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -m slow -n $(WORKERS) --ignore=tests/faults --ignore=tests/ops
	XLA_FLAGS= $(BIN)/python -m pytest -q -m slow tests/ops  # measures time
	$(BIN)/python -m pytest -q -m slow -n $(WORKERS) tests/faults

# One seed of each kind of fault, and every fault of a layout; about ten minutes.
test-slow-smoke: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -m slow -n $(WORKERS) tests/faults tests/multidevice/planted_faults_test.py \
	  -k 'seed_03 or not (seed_ or goodput)'

# Whether this code computes what an earlier commit did, to the last bit; half an hour of two cores.
same-numbers: $(VENV)/installed-dev
	@test -n "$(BASE)" || { echo "error: of which commit? make same-numbers BASE=COMMIT" >&2; exit 2; }
	$(BIN)/python -m tests.same_numbers --base=$(BASE)

# What else computes the same, transformers itself beside it, in an environment with torch.
LIVE = tests/models/pretrained/live_test.py tests/models/public_attention_test.py \
  tests/moe/public_test.py tests/contracts/ropes_test.py tests/commands/convert_live_test.py \
  tests/data/chat_template_test.py tests/data/template_training_test.py \
  tests/bench/torch_operations_test.py tests/parallel/pipelines/public_orders_test.py \
  tests/checkpoint/torch_live_test.py
test-hf: $(HF_VENV)/installed-hf
	$(HF_VENV)/bin/python -m pytest -q -n $(WORKERS) -m 'not slow' $(LIVE)

# The tiny training step on 16 TPU chips that are not there; not 0 if it does not compile or fit.
# Then kernels for v5e and v5p, into jaxmoe/ops/ahead.json, and whether rings hide what they send.
look-ahead: $(TPU_VENV)/installed-tpu
	$(TPU_VENV)/bin/python -m launch.explain --config=configs/tiny.py --topology=v5e:4x4 \
	  --config.parallel.data=4 --config.parallel.fsdp=4 --config.train.batch_size=16
	$(TPU_VENV)/bin/python -m launch.explain --config=configs/tiny.py --topology=h200:1x1x8 \
	  --config.parallel.data=4 --config.parallel.expert=2 --config.train.batch_size=8
	# What was compiled for devices that are not there cannot be fetched from a cache.
	JAX_ENABLE_COMPILATION_CACHE=false JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 $(TPU_VENV)/bin/python -c \
	  'from jaxmoe.plan import kernels_ahead as ahead; ahead.write_ahead(ahead.compile_ahead())'
	JAX_ENABLE_COMPILATION_CACHE=false JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 \
	  $(TPU_VENV)/bin/python -m pytest -q tests/parallel/look_ahead_test.py tests/plan/topology_test.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	PYTHONPATH=. $(BIN)/lint-imports --no-cache
	$(BIN)/mypy

venv: $(VENV)/installed-dev

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one, or run make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@test -z "$(STALE)" || echo "$(VENV) has no Python 3.11 or 3.12; it is made anew"
	$(PYTHON) -m venv $(if $(STALE),--clear) $(VENV)

# torch without CUDA, which no comparison needs.
$(HF_VENV)/installed-hf: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m venv $(HF_VENV)
	$(HF_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --retries 1 -e '.[dev,hf]' \
	  --extra-index-url https://download.pytorch.org/whl/cpu
	@touch $@

$(TPU_VENV)/installed-tpu: setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one, or run make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(TPU_PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,tpu]' $(if $(JAX),'jax[tpu]==$(JAX).*')
	# Of the extra [cuda] what compiles, and none of what runs (2 GB more).
	version=$$($(TPU_VENV)/bin/python -c 'import jax; print(jax.__version__)') && \
	  $(TPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version nvidia-cuda-nvcc nvidia-nvvm
	@touch $@

$(VENV)/installed: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/installed-dev: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) $(TPU_VENV) $(TPU_VENV)-0.1? $(HF_VENV) build *.egg-info .mypy_cache .ruff_cache
