# `make help` lists the targets. Nothing needs to be activated or installed first: whatever a target
# needs is put into .venv once.

VENV      := .venv
PY        := $(VENV)/bin/python
# Install again when, and only when, what is to be installed has changed.
WANTED    := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
INSTALLED := $(VENV)/.installed-$(WANTED)
ALL       := --editable '.[pipeline,zoo,frontier,dev]'
# By uv, on the same disk, so that what is installed are links to it; one that was stopped goes on.
UNPACKED  := $(VENV)/.uv
# What uv is told, as it reads nothing of pip's: pip's setting, and uv's variable. Of several indexes
# pip takes the best version, as uv does by the strategy below.
AS_PIP    := index-url=UV_DEFAULT_INDEX extra-index-url=UV_EXTRA_INDEX_URL find-links=UV_FIND_LINKS cert=SSL_CERT_FILE
# Free, for 7 that stay.
GB        := 9

# Nobody is told that this ran.
export DO_NOT_TRACK := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Threads that wait for one another by spinning are many times slower on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE

# Set in many images of containers: each process would compile all that it imports, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo mlflow test test-services check docs clean need-git

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED)  ## make .venv and install everything into it

# In-process: no server, and no Prefect or MLflow setting of the user's gets in the way.
THEIRS = $$(env | sed -nE 's/^((PREFECT|MLFLOW)_[A-Z0-9_]*)=.*/-u \1/p')
demo: need-git $(INSTALLED)  ## run the whole pipeline on the embedded world
	@env $(THEIRS) PREFECT_HOME="$(CURDIR)/.prefect" $(PY) -m flows distill

# One worker and no job runners: up in seconds.
mlflow: $(INSTALLED)  ## show the runs and the registry of this folder at http://127.0.0.1:5000
	@$(PY) -m components.tracking
	@echo "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(PY) -m mlflow server --workers 1 \
	    --backend-store-uri sqlite:///mlflow.db

test: need-git $(INSTALLED)  ## run the tests that are quick
	@$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# Real servers, killed and started again, on 127.0.0.1, and what takes minutes.
# A process for each file: Ray joins one cluster in a process.
test-services: need-git $(INSTALLED)  ## run the tests that need servers or take long
	@failed=; for file in $$(grep -rlE 'mark\.services|tests\.cases import' tests --include='test_*.py'); do \
	    $(PY) -m pytest -m services --numprocesses 0 $$file || failed="$$failed $$file"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

check: $(INSTALLED)  ## lint, format, types, import contracts
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet .
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports

# The variable silences an announcement of its successor, which --strict does not count.
docs: $(INSTALLED)  ## build the documentation as a site, in build/site
	@PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

# Of data/ what stages write alone: one's own images and prompts may lie beside it.
clean:  ## remove the environment and everything the pipeline wrote
	rm -rf $(VENV) .prefect data/prepared data/cache data/.prepared.* data/.cache.* \
	    guides results runs mlflow.db* mlruns mlartifacts .dvc/cache .dvc/tmp build *.egg-info \
	    .pytest_cache .ruff_cache .mypy_cache

$(INSTALLED):
	@free=$$(df -Pk . 2>/dev/null | sed -n 's/.* \([0-9][0-9]*\)  *[0-9][0-9]*%.*/\1/p'); \
	free=$$(( $${free:-$(GB)000000} / 1000000 )); \
	test -x $(PY) || test $$free -ge $(GB) || { \
	    echo "error: $(CURDIR) has $$free GB free, and installing takes $(GB) GB, more than it keeps: free some, or clone to another disk" >&2; \
	    exit 1; }
	@$(PY) -c '' 2>/dev/null || { \
	    for python in $(PYTHON) python3.12 python3.11 python3; do \
	        $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12)})' \
	            2>/dev/null && found=$$python && break; \
	    done; \
	    test -n "$$found" || { \
	        echo "error: no Python 3.11 or 3.12 with venv found: install python3.11 and python3.11-venv, or say make PYTHON=/path/to/python3.11" >&2; \
	        exit 1; }; \
	    $$found -m venv --clear $(VENV); }
	@echo "Installing into $(VENV): about 7 GB, a few minutes, once"
	@said=$$($(PY) -m pip config list 2>/dev/null); \
	pip_has() { for of in :env: install global; do \
	    printf '%s\n' "$$said" | sed -n "s/^$$of\.$$1='\(.*\)'\$$/\1/p"; done | head -n 1 | sed 's/\\n/ /g'; }; \
	for pair in $(AS_PIP); do \
	    value=$$(pip_has $${pair%=*}); name=$${pair#*=}; \
	    test -z "$$value" || eval "export $$name=\"\$${$$name:-\$$value}\""; \
	done; \
	export PYTHONWARNINGS=ignore UV_CACHE_DIR="$(abspath $(UNPACKED))" UV_INDEX_STRATEGY=unsafe-best-match; \
	wanted="--quiet --constraint constraints.txt"; \
	{ test -z "$$(pip_has no-index)" && $(PY) -m pip install $$wanted uv \
	    && $(PY) -m uv pip install --python $(PY) $$wanted $(ALL); } \
	    || { echo "by pip then, which takes minutes"; rm -rf $(UNPACKED); \
	        $(PY) -m pip install $$wanted $(ALL); }
	@rm -rf $(UNPACKED) $(VENV)/.installed-* && touch $@

need-git:
	@command -v git >/dev/null || { \
	    echo "error: git is not installed, and DVC versions the pipeline's results with it: install git" >&2; exit 1; }
	@git rev-parse --git-dir >/dev/null || { \
	    echo "error: git knows no repository here, and DVC versions the pipeline's results with it: clone this project instead of downloading it, or: git init && git add . && git commit -m start" >&2; exit 1; }
