# Two commands: `make reproduce` (Baseline-8 against CAEM-8 at tiny, a quarter of an hour on 2 cores) and `make test`.
# `make evidence` is all of the paper's tables and figures for one seed, about an hour.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PEERS := .venv-peers

.PHONY: setup reproduce evidence test test-peers lint bench faults

setup: $(VENV)/ready
	@$(RUN) caem_files/install.py

# Everything by its hash, then torch by its version, so that its CPU and its CUDA build both do (docs/trust.md).
$(VENV)/ready: requirements.txt requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check $$(grep ^torch== requirements.txt)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

reproduce: setup
	$(RUN) reproduce_tables.py --scale tiny --parts comparison

evidence: setup
	$(RUN) reproduce_tables.py --scale tiny

test: setup
	$(RUN) -m pytest

# The comparisons with fusion-bench and mergekit, which `make test` skips, in an environment of its own with all that they need.
test-peers: $(PEERS)/with-peers
	$(PEERS)/bin/python -c "import fusion_bench, mergekit"
	$(PEERS)/bin/python -m pytest -rs -k "fusion_bench or mergekit" tests/merging tests/wemoe

# mergekit asks for another transformers than ours (5, where it is 4.46.3), but its merging does without.
$(PEERS)/with-peers: requirements.txt requirements.lock requirements-peers.txt
	$(MAKE) setup VENV=$(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.txt -r requirements-peers.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps mergekit==0.1.5
	touch $@

# Kills every script thirty times and feeds the readers broken files; ten minutes on 2 free cores.
faults: setup
	$(RUN) tests/faults.py

# Half an hour on 2 cores, with 13 GB of memory and 10 GB of disk.
bench: setup
	$(RUN) benchmarks/layer.py
	$(RUN) benchmarks/training.py
	$(RUN) benchmarks/evaluation.py
	$(RUN) benchmarks/preprocessing.py
	$(RUN) benchmarks/merging.py runs/bench --layers 4
	rm -r runs/bench
	$(RUN) benchmarks/startup.py
	$(RUN) benchmarks/table.py

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
