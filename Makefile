# make demo   set up, then four rounds of self-evolution of the miniature on this machine
# make demo-pretrained   the same with a real pretrained model (docs/pretrained.md)
# make test   set up, then lint and all tests
# make check  lint, types and the fast tests: after each change
VENV ?= .venv
export VENV
CORES := $(shell nproc)
# Processes that run tests with Ray, which wait as much as they work. Ray gives a node 30 s to start: more
# at a time get in each other's way on a small machine.
WORKERS ?= 2
# Minutes after which no further test is begun (those left out are counted); empty: all are.
MINUTES ?=
export RSTAR_TESTS_UNTIL := $(if $(MINUTES),$(shell echo $$(($$(date +%s) + 60 * $(MINUTES)))))
PYTEST = $(VENV)/bin/python -m pytest -q --dist loadfile --no-loadscope-reorder
# $(call tests,FOLDERS,PROCESSES): what failed is run once more with the machine to itself, which tells a
# fault from a machine that was too busy for somebody's clock; both runs are in the output.
tests = $(PYTEST) $(1) -n $(2) || { [ $$? -eq 1 ] && echo "test: what failed, once more and alone" && \
	RSTAR_TESTS_UNTIL= $(PYTEST) $(1) -n 0 --last-failed --last-failed-no-failures none; }

.PHONY: install demo demo-pretrained test check lint unit docs-check format clean

install:
	@deploy/install.sh

demo: install
	$(VENV)/bin/rstar evolve deploy/configs/demo.yaml

demo-pretrained: install
	@deploy/pretrained.sh
	$(VENV)/bin/rstar evolve deploy/configs/pretrained.yaml

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

unit: install
	$(call tests,tests/unit,$(CORES))

check: lint unit

# Parses every command that README and docs/ show; part of `make test`.
docs-check: install
	$(VENV)/bin/python -m pytest tests/unit/docs -q

test: lint
	@deploy/test_tools.sh
	$(call tests,tests/unit,$(CORES))
	$(call tests,tests/integration tests/slow,$(WORKERS))

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
