# The commands of the project. Each sets up its own environment (.venv) when there is none.
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help demo test check format clean

help:
	@echo "make demo    pronounce held-out words with the bundled checkpoint, beside the stock class"
	@echo "make test    the whole test suite"
	@echo "make check   ruff format, ruff lint, mypy"
	@echo "make format  rewrite the sources as ruff wants them"
	@echo "make clean   remove the environment and the tools' leftovers"

# Remade when the dependencies change.
$(STAMP): pyproject.toml tools/setup_env.py
	$(PYTHON) tools/setup_env.py $(VENV)
	@touch $@

demo: $(STAMP)
	$(RUN) -m examples.pronounce.demo

test: $(STAMP)
	$(RUN) -m pytest -n auto

check: $(STAMP)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: $(STAMP)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
