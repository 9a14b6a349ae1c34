# make demo: a virtual environment, the package, and the whole story on drawn shapes, from the package index alone.
# make test: the tests but the slow ones, on two processes; make test-all: all of them, which CI runs. For ENGINE=detectron2
# and its tests Detectron2 is installed into it by hand (README.md, Set-up).
VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist worksteal
ENGINE ?= torchvision
DEMO_ARGS ?=
BIN = $(VENV)/bin

.PHONY: install detectron2 demo test test-all test-torches lint docs package

# setuptools < 81 has the pkg_resources that Detectron2's model zoo imports.
install:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt wheel "setuptools<81"
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"

# Detectron2 from source, at the tested commit, beside this folder.
detectron2: install
	$(BIN)/python -m pip install -q -c constraints.txt ninja torch torchvision
	test -d ../detectron2 || git clone -q https://github.com/facebookresearch/detectron2 ../detectron2
	git -C ../detectron2 checkout -q 02b5c4e
	$(BIN)/python -m pip install -q --use-pep517 --no-build-isolation -e ../detectron2

demo: install
	$(BIN)/acam-kd demo --engine $(ENGINE) $(DEMO_ARGS)

test: install
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The oldest and the newest torch that setup.py and constraints.txt allow, each in a virtual environment of its own.
TORCHES ?= 2.6.0:0.21.0 2.14.1:0.29.1
test-torches:
	mkdir -p build
	grep -v "^torch\(vision\)\?==" constraints.txt > build/constraints-without-torch.txt
	set -e; for pair in $(TORCHES); do \
	  place=build/torch-$${pair%%:*}; \
	  test -x $$place/bin/python || $(PYTHON) -m venv $$place; \
	  $$place/bin/python -m pip install -q -c build/constraints-without-torch.txt wheel "setuptools<81" \
	    torch==$${pair%%:*} torchvision==$${pair##*:}; \
	  $$place/bin/python -m pip install -q -c build/constraints-without-torch.txt --no-build-isolation -e ".[dev]" \
	    torch==$${pair%%:*} torchvision==$${pair##*:}; \
	  $$place/bin/python -m pytest -m "not slow" $(PYTEST_ARGS); \
	done

lint: install
	PATH="$(abspath $(BIN)):$$PATH" bash dev/linter.sh

# The site, in build/docs/html; a warning fails it.
docs: install
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[docs]"
	PYTHON="$(abspath $(BIN))/python" bash dev/docs.sh

# Wheel and source distribution, checked.
package: install
	$(BIN)/python -m pip install -q -c constraints.txt build twine
	rm -rf dist
	$(BIN)/python -m build -n
	$(BIN)/python -m twine check --strict dist/*
