# Each target sets itself up: an environment in .venv, and what it needs inside.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=
FLAX ?= ../flax

.PHONY: help demo lint test quick test-lowest mutants flax-tests docs screenshots bench traffic scaling dist format clean

help:
	@echo "make demo         train and compare normalizations on real digits"
	@echo "make test         linter, type checker, doctests and tests"
	@echo "make quick        some of it, in a minute and a half at most"
	@echo "make test-lowest  the tests with the oldest supported dependencies"
	@echo "make flax-tests   flax's own tests, in FLAX=folder, with our layers for flax's"
	@echo "make mutants      changes the package in small ways; tells what no test notices"
	@echo "make docs         build the documentation in docs/_build/html, and check it"
	@echo "make screenshots  look at its pages in a browser, wide and narrow, light and dark"
	@echo "make bench        time layers and training steps on this device"
	@echo "make traffic      compile for GPUs and TPUs that are not here; add up the bytes"
	@echo "make scaling      compile for 1, 8 and 64 of them; add up what they send each other"
	@echo "make dist         build the wheel and the sdist; try the wheel in an empty environment"
	@echo "make format       format the code"
	@echo "ARGS='...' passes options on: make demo ARGS='--help'"

# One environment, and one stamp a group of optional dependencies.
$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml $(VENV)/bin/pip
	$(VENV)/bin/pip install --quiet --editable '.[$*]'
	@touch $@

demo: $(VENV)/.installed-examples
	$(VENV)/bin/python examples/train.py $(ARGS)

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	$(VENV)/bin/pytest -n $(JOBS) $(ARGS)

# For the inner loop: what a change of the arithmetic or of a layer breaks first.
QUICK = api errors every_layer folding_errors lattice linen nnx \
  normalization readme sampling statistics virtual

quick: lint
	$(VENV)/bin/pytest -n $(JOBS) $(QUICK:%=tests/test_%.py) $(ARGS)

# The lower bounds of pyproject.toml, turned into versions.
LOWEST = $(shell $(PYTHON) -c "import tomllib; \
  print(*(d.replace('>=', '==') for d in \
    tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))")

test-lowest:
	$(MAKE) .venv-lowest/.installed-test VENV=.venv-lowest
	.venv-lowest/bin/pip install --quiet $(LOWEST)
	.venv-lowest/bin/pytest -n $(JOBS) $(ARGS)

mutants: $(VENV)/.installed-test
	$(VENV)/bin/python tests/mutants.py --jobs $(JOBS) $(ARGS)

flax-tests: $(VENV)/.installed-test
	$(VENV)/bin/python tests/flax_suite.py --jobs $(JOBS) $(ARGS) $(FLAX)

docs: $(VENV)/.installed-docs
	$(VENV)/bin/sphinx-build -W --keep-going -b html docs docs/_build/html
	$(VENV)/bin/python docs/check.py

# Of the pages that `make docs` built; needs Chromium, or says that it is not there.
screenshots: $(VENV)/.installed-screenshots
	$(VENV)/bin/python docs/screenshots.py $(ARGS)

bench: $(VENV)/.installed-examples
	$(VENV)/bin/python benchmarks/speed/train_step.py --minutes 4.5 $(ARGS)
	$(VENV)/bin/python benchmarks/speed/layer.py --what block --minutes 2 $(ARGS)
	$(VENV)/bin/python benchmarks/speed/layer.py --minutes 1.5 $(ARGS)
	$(VENV)/bin/python benchmarks/reports/report.py

# In an environment of its own: without a driver, JAX's CUDA plugin complains elsewhere.
traffic scaling:
	$(MAKE) .venv-traffic/.installed-traffic VENV=.venv-traffic
	.venv-traffic/bin/python benchmarks/compiled/$@.py $(ARGS)

# Of what is committed: no stray file gets in. The wheel is built from the sdist.
dist: $(VENV)/.installed-dist
	@test -z "$$(git status --porcelain)" || \
	  (echo "Commit or remove these first:"; git status --short; exit 1)
	rm -rf dist
	$(VENV)/bin/python -m build
	new=$$(mktemp -d) && trap "rm -rf $$new" EXIT && $(PYTHON) -m venv $$new && \
	  $$new/bin/pip install --quiet dist/*.whl && cp tests/smoke.py $$new && \
	  cd $$new && bin/python smoke.py

format: $(VENV)/.installed-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf .venv .venv-lowest .venv-traffic dist docs/_build
