# Two commands set everything up on a machine with Python >= 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The live deployment needs PyTorch. WITH_TORCH=1 or 0 decides; by default it is installed on Python 3.11, for which
# constraints.txt pins a small CPU build, and left to you elsewhere, where a plain install brings gigabytes of CUDA packages.
WITH_TORCH ?= $(shell $(PYTHON) -c 'import sys; print(int(sys.version_info[:2] == (3, 11)))')

comma := ,
EXTRAS := dev$(if $(filter 1,$(WITH_TORCH)),$(comma)runtime,)
STAMP := $(VENV)/.installed-$(WITH_TORCH)

.PHONY: demo test test-all lint bench format clean
.DEFAULT_GOAL := demo

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "moesim needs Python >= 3.11; name one with make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing moesim[$(EXTRAS)] into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@rm -f $(VENV)/.installed-*; touch $@

demo: $(STAMP)            ## walk the loop once: replay, solve, serve, apply, compare
	$(BIN)/moesim demo --out demo-out

test: $(STAMP)            ## the tests, about nine minutes on two cores; a third worker, because live tests wait
	$(BIN)/python -m pytest -n 3 --dist loadfile -m "not slow and not gpu"

test-all: $(STAMP)        ## the tests with new random examples, and the long grids
	MOESIM_RANDOM_TESTS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)            ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)           ## speed, each figure beside a baseline run in the same process
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
