#!/usr/bin/env bash
# The site, strictly: pages are prepared in build/docs/source and built into build/docs/html.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="projects${PYTHONPATH:+:$PYTHONPATH}"
"${PYTHON:-python}" docs/generate.py build/docs/source
"${PYTHON:-python}" -m sphinx -W --keep-going -q -E -c docs -d build/docs/doctrees build/docs/source build/docs/html
