# Two commands do everything: `make demo` and `make test`.
VENV   ?= .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.setup-stamp
ARGS   ?=
CODE   := $(wildcard src tests benchmarks examples scripts)

.PHONY: demo test test-gpu check clients schema setup host host-test format clean

demo: setup          ## set up, then watch a V4 model work on fresh tasks in a real container
	@$(VENV)/bin/rorqual demo $(ARGS)

test: host-test setup check    ## set up, then every check and test
	@$(PY) -m pytest $(ARGS)

test-gpu: setup      ## the Triton kernels: on a GPU, else interpreted; adds triton (0.7 GB) to the environment
	@$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(VENV)/bin/pip install -q triton==3.7.1  # torch 2.13's own
	@$(PY) -m pytest tests/kernels/test_gpu_*.py $(ARGS)

check: setup         ## ruff, mypy --strict, import contracts, generated files
	@$(VENV)/bin/ruff check $(CODE)
	@$(VENV)/bin/ruff format --check $(CODE)
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports --no-cache
	@$(PY) scripts/unasync.py --check

clients: setup       ## real clients, each in its own environment, against the server; writes docs/compat.md
	@$(PY) scripts/clients.py $(ARGS)

schema: setup        ## made-up requests against the server's schema, for as long as it takes
	@RORQUAL_SCHEMA_EXAMPLES=$(or $(EXAMPLES),300) $(PY) -m pytest tests/serve/test_schema.py $(ARGS)

format: setup
	@$(VENV)/bin/ruff check --fix $(CODE)
	@$(VENV)/bin/ruff format $(CODE)
	@$(PY) scripts/unasync.py

setup: host $(STAMP)

host:
	@sh scripts/setup_host.sh

host-test:
	@sh scripts/setup_host.sh test

$(STAMP): pyproject.toml hatch_build.py scripts/setup_venv.sh $(wildcard native/guest/* native/cpu/*.*)
	@sh scripts/setup_venv.sh $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist src/rorqual/sandbox/_bin src/rorqual/kernels/_bin
