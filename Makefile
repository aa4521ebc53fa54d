# The commands of the project. Each sets up its own environment (.venv) when there is none.
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
OLDEST := $(VENV)/oldest

.PHONY: help demo test test-oldest check format clean

help:
	@echo "make demo    pronounce words and continue docstrings with the bundled T5 and GPT-2, beside"
	@echo "             the stock classes"
	@echo "make test    the whole test suite"
	@echo "make test-oldest  parity and generation tests with the oldest transformers supported"
	@echo "make check   ruff format, ruff lint, mypy"
	@echo "make format  rewrite the sources as ruff wants them"
	@echo "make clean   remove the environment and the tools' leftovers"

# Remade when the dependencies change.
$(STAMP): pyproject.toml tools/setup_env.py
	$(PYTHON) tools/setup_env.py $(VENV)
	@touch $@

demo: $(STAMP)
	$(RUN) -m examples.pronounce.demo
	$(RUN) -m examples.docstrings.demo

test: $(STAMP)
	$(RUN) -m pytest -n auto

$(OLDEST)/.installed: $(STAMP) tools/oldest_env.py fastgen/hf/contract.py
	$(RUN) tools/oldest_env.py $(OLDEST)
	@touch $@

test-oldest: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(RUN) -m pytest -n auto tests/test_parity.py tests/generation tests/hf

check: $(STAMP)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: $(STAMP)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
