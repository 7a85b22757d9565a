#!/usr/bin/env bash
# From a fresh machine with Python 3.11 to a report on generated videos:
#
#   bash launch/quickstart.sh [DIR] [--long] [--from-scratch]     DIR defaults to runs/quickstart
#
# Makes .venv, installs pinned requirements, then runs every step of quickstart.py. Safe to end at any moment and to run again.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment "$root/requirements.txt" quickstart
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -P -m launch.quickstart "$@"
