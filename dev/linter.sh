#!/usr/bin/env bash
# Lint, format and types, as CI checks them. Detectron2 has no types, so its absence changes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
mypy
