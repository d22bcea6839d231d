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
# A file stays in one process, and the files in their order: the longest is first. One process more
# than cores, since those of sandboxes mostly wait; many would only wait for memory and services.
processes=$(($(nproc) < 4 ? $(nproc) + 1 : 4))
pytest --numprocesses "$processes" --dist loadfile --no-loadscope-reorder "$@"
