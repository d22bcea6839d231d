#!/usr/bin/env bash
# The recipe on this machine, from nothing but git and Python: installs into .venv, runs
# `klong recipe` with the given settings, and says where the report is.
#
#   launch/local.sh [NAME=VALUE ...]        such as profile=smoke seed=0
#
# Running it again resumes. PYTHON chooses the interpreter.
set -euo pipefail

cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

install_into_venv ""
started=.venv/recipe-started
touch "$started"
.venv/bin/klong recipe "$@"
find "$PWD" -path "$PWD/.venv" -prune -o -name report.html -newer "$started" -printf 'report: %p\n'
