#!/usr/bin/env bash
# The main job on a fresh clone: install, then `torchrun recipes/bloodmnist.py`. Arguments are passed on to the recipe.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
gidef_environment
exec torchrun recipes/bloodmnist.py "$@"
