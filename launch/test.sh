#!/usr/bin/env bash
# The tests on a fresh clone: install with the test extra, then run them. Arguments are passed on to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
gidef_environment test
export OMP_NUM_THREADS=1 MPLBACKEND=Agg
exec python -m pytest -n 2 "$@"
