# Every target installs what it needs, once: again only after pyproject.toml or constraints.txt changed, or the folder moved.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed-$(shell pwd | cksum | cut -d' ' -f1)
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test lab docs clean

help:
	@echo "make demo    install, then run the whole loop: events, a fine-tuned language model, its judgement, its promotion"
	@echo "make test    install, then run every check"
	@echo "make lab     open JupyterLab on the evaluation dashboard"
	@echo "make docs    build the site into _docs"
	@echo "make clean   stop the local database, remove what was built and everything in .workbench (runs, models, events)"
	@echo "PYTHON=python3.12 chooses the interpreter (3.11 or newer); VENV=folder chooses where to install"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python %d.%d is too old: name 3.11 or newer, such as make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "installing into $(VENV) (once, a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m compileall -q mlops_workbench benchmarks  # an editable install does not: kernels would compile again and again
	@rm -f $(VENV)/installed-*; touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/workbench demo

# The rules of the house (export and clean change nothing, README and site are current) are tests too, and run on a copy of the tree.
test: $(STAMP)
	@set -e; PATH="$$(cd $(BIN) && pwd):$$PATH"; export PATH; \
	state() { git status --porcelain 2>/dev/null; git diff 2>/dev/null; }; \
	before="$$(state | cksum)"; \
	echo "ruff check";  ruff check --quiet .; \
	echo "ruff format"; ruff format --quiet --check .; \
	echo "notebooks (nbdev-test)"; nbdev-test --n-workers 2; \
	echo "tests (pytest)"; python -m pytest -n 2 --dist loadfile; \
	[ "$$before" = "$$(state | cksum)" ] || { echo "the checks changed the working tree:"; git status --short; exit 1; }

lab: $(STAMP)
	@flags=; [ "$$(id -u)" != 0 ] || flags=--allow-root; \
	$(BIN)/python -m jupyterlab $$flags nbs/dashboards/evaluation.ipynb

docs: $(STAMP)
	@$(BIN)/python -m mlops_workbench.docs site

clean:
	@if [ -d .workbench ] && [ -x $(BIN)/workbench ]; then \
		env -u WORKBENCH_DATABASE_URL -u WORKBENCH_HOME WORKBENCH_ENVIRONMENT=local $(BIN)/workbench db down; fi
	@rm -rf .workbench _docs _proc build dist *.egg-info nbs/nbdev.yml nbs/sidebar.yml .pytest_cache .ruff_cache .hypothesis
	@find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
