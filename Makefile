# `make demo` and `make test` are all a fresh machine needs: each sets up what it uses.
PYTHON ?= 3.11
VENV := .venv
RUN := $(VENV)/bin/python
UV := $(or $(shell command -v uv),.uv/bin/uv)
VLLM := $(if $(shell nvidia-smi -L 2>/dev/null),gpu,cpu)
# torch's CPU build is not on PyPI: take it from the user's own wheel folder, or let uv find its index.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
TORCH := $(if $(UV_FIND_LINKS),,$(if $(filter cpu,$(VLLM)),--torch-backend=cpu))
DEPENDENCIES := pyproject.toml --extra databases --extra mlperf --group dev
WITH_VLLM := $(TORCH) --extra $(VLLM) --extra demo --extra botorch

# For the tests that submit jobs to a SLURM of their own, with accounting, or keep a study in a database server.
SERVICES := munge slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin mariadb-server postgresql
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)

.PHONY: setup lock demo test check coverage lint services browser clean

setup: $(VENV)/.ready  ## virtual environment with vLLM for this machine

$(VENV)/.ready: pyproject.toml constraints.txt | $(UV)
	$(UV) venv -q --allow-existing --python $(PYTHON) $(VENV)
	$(UV) pip install -q --python $(RUN) -r $(DEPENDENCIES) $(WITH_VLLM) --constraint constraints.txt
	$(UV) pip install -q --python $(RUN) --no-deps -e .
	touch $@

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/pip install -q uv

# vLLM pins much of what MLflow and others use, so its versions are found first; it and torch themselves are not locked.
COMPILE := pip compile -q --python-version 3.11 --no-header --no-annotate $(DEPENDENCIES)
lock: | $(UV)  ## renew constraints.txt: the newest versions that go with vLLM; `make test` says whether they work
	all=$$(mktemp) && $(UV) $(COMPILE) $(WITH_VLLM) >$$all && \
	  $(UV) $(COMPILE) --constraint $$all --upgrade --output-file constraints.txt >/dev/null; status=$$?; rm -f $$all; exit $$status

demo: setup  ## tune SmolLM2-135M on this machine: a baseline and 5 trials
	$(RUN) -m autotune -m experiment=demo

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

check: lint  ## what a commit must pass, in a minute and a half
	$(RUN) -m pytest --durations=10

coverage: setup  ## the share of the code that the fast tests run, processes included
	OC_CAUSE=0 $(RUN) -m pytest --cov  # a tracer is no debugger, whose user OmegaConf tells more

services:  ## what tests need beside Python: Debian's packages, where they are missing
	@PATH=$$PATH:/usr/sbin; which munged slurmctld slurmd srun slurmdbd mariadbd >/dev/null && ls -d /usr/lib/postgresql/*/bin >/dev/null 2>&1 || \
	  { $(SUDO) apt-get update -q && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(SERVICES); }

browser:  ## Chromium for the tests of MLflow's pages and of the report: Debian's package, where it is missing
	@which chromium >/dev/null || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -y -q --no-install-recommends chromium; }

test: lint services browser  ## everything, with real vLLM, a real SLURM, real databases and a real browser
	$(RUN) -m pytest -m "not gpu"

clean:
	rm -rf $(VENV) .uv .pytest_cache .mypy_cache .ruff_cache
