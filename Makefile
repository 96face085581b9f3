# make run   serve SmolLM2-135M-Instruct on this machine
# make test  the whole quick suite
# make lint  formatting, lint, types
#
# Variables: PYTHON (python3), VENV (.venv), TORCH (another PyTorch version than constraints.txt pins),
# TORCH_INDEX (an extra package index to take PyTorch from, for instance one of CPU builds),
# MODEL (smollm2), HOST (127.0.0.1), PORT (8000), ARGS (more options of `mainspring serve`).
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
TORCH_INDEX ?=
MODEL ?= smollm2
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=

SOURCES := pyproject.toml constraints.txt CMakeLists.txt tools/bootstrap.py \
	$(shell find csrc -type f 2>/dev/null)
BOOTSTRAP = $(PYTHON) tools/bootstrap.py --venv $(VENV) --torch "$(TORCH)" --torch-index "$(TORCH_INDEX)"

.PHONY: run test test-all lint format clean
.DELETE_ON_ERROR:

run: $(VENV)/.serve
	@exec $(VENV)/bin/mainspring serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -n auto --dist worksteal

test-all: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -n auto --dist worksteal -m "not gpu"

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/.serve: $(SOURCES)
	@$(BOOTSTRAP) --extras serve
	@touch $@

$(VENV)/.dev: $(SOURCES)
	@$(BOOTSTRAP) --extras serve,rag,milvus,rl,dev
	@touch $@ $(VENV)/.serve

clean:
	rm -rf $(VENV) build dist
