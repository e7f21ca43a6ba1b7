# Every verb does its own set-up: `make bench` and `make test` work on a fresh clone.
#   PYTHON=python3.12 make test     another interpreter for the environment
#   make test ARGS="-k dispatch"    arguments for pytest;  make bench ARGS="--world-size 4"  for the bench
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

python := $(VENV)/bin/python
installed := $(VENV)/.installed
clang_format := PATH="$(VENV)/bin:$$PATH" clang-format
dev_installed := $(VENV)/.dev_installed
engines := .venv-engines
cuda_sources := $(shell find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' 2>/dev/null)

.PHONY: help bench test fuzz proof models engines cycles mutants lint format typecheck clean
help:
	@echo "make bench      check and time the ops on this machine"
	@echo "make test       run the tests; says what was skipped and what it needed"
	@echo "make mutants    break the package in known ways, see that tests notice, write the table of docs/proof.md"
	@echo "make fuzz       random calls on CPU ranks;  make fuzz ARGS='--world-size 3 --seed 1000 --count 5000'"
	@echo "make proof      the proof on this machine's GPUs: ten minutes on two; see docs/proof.md"
	@echo "make models     SmolLM2-135M, downloaded once, over 2 and 3 CPU ranks: the same tokens and perplexity (minutes)"
	@echo "make engines    vLLM, and SGLang's layers, on two CPU ranks with the plugins and without, in $(engines) (minutes)"
	@echo "make cycles     make and close a group 10,000 times: nothing may be left behind (minutes)"
	@echo "make lint       ruff and clang-format, reading only;  make format: the same, writing"
	@echo "make typecheck  mypy"
	@echo "make clean      remove what was built, the environment too"

$(installed): pyproject.toml setup.py CMakeLists.txt scripts/make_venv.py $(cuda_sources)
	$(PYTHON) scripts/make_venv.py $(VENV) bench,test
	@touch $@

$(dev_installed): $(installed)
	$(PYTHON) scripts/make_venv.py $(VENV) dev
	@touch $(installed) $@

bench: $(installed)
	$(python) -m tp_overlap_kernels.bench run $(ARGS)

test: $(installed)
	$(python) -m pytest -rs $(ARGS)

mutants: $(installed)
	$(python) tests/mutants/run.py $(ARGS)

fuzz: $(installed)
	$(python) -m tests.fuzz $(ARGS)

proof: $(installed)
	@failed=; for part in soak replay bits fuzz delay faults hog sanitizer; do \
		$(python) -m tests.proof $$part --json bench/results/proof/$$part.json $(ARGS) || failed="$$failed $$part"; \
	done; test -z "$$failed" || { echo "violations in:$$failed"; exit 1; }

models: $(installed)
	$(python) -m pytest -q -rs --real-weights tests/integrations/test_smollm2.py $(ARGS)

$(engines)/.installed: pyproject.toml scripts/make_engines.py scripts/make_venv.py
	$(PYTHON) scripts/make_engines.py $(engines)
	@touch $@

engines: $(engines)/.installed
	$(engines)/bin/python -m pytest -q -rs tests/integrations/test_vllm_engine.py $(ARGS)
	PYTHONPATH=$(engines)/sglang $(engines)/bin/python -m pytest -q -rs tests/integrations/test_sglang_layers.py $(ARGS)

cycles: $(installed)
	$(python) -m pytest -q --timeout 3600 tests/memory/test_cycles.py --cycles 10000 $(ARGS)

lint: $(dev_installed)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(clang_format) --dry-run --Werror $(cuda_sources)

format: $(dev_installed)
	$(python) -m ruff check --fix .
	$(python) -m ruff format .
	$(clang_format) -i $(cuda_sources)

typecheck: $(dev_installed)
	$(python) -m mypy

clean:
	rm -rf $(VENV) $(engines) .t36 build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache tp_overlap_kernels/libtpo_kernels.so
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
