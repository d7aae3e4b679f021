#!/usr/bin/env bash
# Every check of the project: lint, format, types, tests. Makes or reuses .venv.
# Arguments go to pytest: bash tools/test.sh tests/test_attention.py -k ulysses
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/venv.sh
. "$root/launch/venv.sh"
set_up dev

cd "$root"
# One thread per process: the distributed tests run up to eight at once.
export OMP_NUM_THREADS=1
.venv/bin/ruff check --quiet .
.venv/bin/ruff format --quiet --check .
.venv/bin/mypy --no-error-summary
# A process of its own runs the tests of a file; each may start ranks, so a few processes keep any machine busy. Files
# come in the order of tests/conftest.py, the longest first.
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
