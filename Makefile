# Two commands: `make reproduce` (the tiny experiment, about a quarter of an hour on 2 cores) and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup reproduce test lint

setup: $(VENV)/ready
	@$(RUN) caem_files/install.py

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

reproduce: setup
	$(RUN) reproduce_tables.py --scale tiny

test: setup
	$(RUN) -m pytest

lint: setup
	$(RUN) -m ruff check .
