#!/usr/bin/env bash
# Every check of the project, from a fresh machine with Python 3.11; arguments go to pytest:
#
#   bash launch/test.sh [-k NAME ...]
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment "$root/tests/requirements.txt" tests
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
bin="$venv/bin"

failed=()
check() {
    echo "Checking: $*"
    "$bin/$1" "${@:2}" || failed+=("$1")
}
check ruff check .
check ruff format --check .
check mypy
check lint-imports

if [ ${#failed[@]} -gt 0 ]; then
    echo "error: these checks found something: ${failed[*]}; the tests follow all the same" >&2
fi
echo "Testing with pytest on 2 processes"
status=0
"$python" -m pytest -n 2 --dist=loadfile --no-loadscope-reorder "$@" || status=$?
if [ ${#failed[@]} -gt 0 ]; then
    echo "error: ${failed[*]} failed, see above" >&2
    exit 1
fi
exit "$status"
