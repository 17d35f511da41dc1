# make demo   set up, then four rounds of self-evolution of the miniature on this machine
# make demo-pretrained   the same with a real pretrained model (docs/pretrained.md)
# make test   set up, then lint and all tests
VENV ?= .venv
export VENV

.PHONY: install demo demo-pretrained test lint unit docs-check format clean

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
	$(VENV)/bin/python -m pytest tests/unit -q

# Parses every command that README and docs/ show; part of `make test`.
docs-check: install
	$(VENV)/bin/python -m pytest tests/unit/docs -q

test: lint
	@deploy/test_tools.sh
	$(VENV)/bin/python -m pytest tests -q

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
