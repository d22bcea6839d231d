#!/usr/bin/env bash
# All checks: lint, format, types, the floors of the house, tests. Arguments go to pytest.
#
#   launch/test.sh [PYTEST ARGUMENT ...]
#
# Services that are missing are skipped with a reason, unless CI=true; .ci/services.sh starts them.
set -euo pipefail

cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

install_into_venv "[dev]"
export PATH="$PWD/.venv/bin:$PATH"
ruff check
ruff format --check
mypy
lint-imports
# A file stays in one process, and the files in their order: the longest is first. More than a few
# processes would only wait for memory and services.
pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
