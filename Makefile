# make demo: a virtual environment, the package, and the whole story on drawn shapes, from the package index alone.
# make test: the tests but the slow ones, on two processes; make test-all: all of them, which CI runs. For ENGINE=detectron2
# and its tests Detectron2 is installed into it by hand (README.md, Set-up).
VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist worksteal
ENGINE ?= torchvision
DEMO_ARGS ?=
BIN = $(VENV)/bin

.PHONY: install demo test test-all lint docs

# setuptools < 81 has the pkg_resources that Detectron2's model zoo imports.
install:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt wheel "setuptools<81"
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"

demo: install
	$(BIN)/acam-kd demo --engine $(ENGINE) $(DEMO_ARGS)

test: install
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: install
	PATH="$(abspath $(BIN)):$$PATH" bash dev/linter.sh

# The site, in build/docs/html; a warning fails it.
docs: install
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[docs]"
	PYTHON="$(abspath $(BIN))/python" bash dev/docs.sh
