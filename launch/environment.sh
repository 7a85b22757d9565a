# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes the virtual environment .venv and installs pinned requirements into it, once.
#
#   make_environment REQUIREMENTS NAME   afterwards "$python" is the environment's interpreter
#
# A marker with the hash of all requirements says what is installed, so a second call costs nothing and a changed pin is noticed.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-$root/.venv}"
python="$venv/bin/python"

fail() {
    echo "error: $*" >&2
    exit 2
}

# The first interpreter that really starts and is 3.11 or later; a shim of a version that is not there does not start.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

hash_requirements() {
    cat "$root/requirements.txt" "$1" | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

# Shows pip's progress as one line that counts packages. Everything pip said is in the log.
count_packages() {
    awk -v total="$1" '
        /^Collecting |^Requirement already satisfied: / { if (n < total) n++; printf "\r  %d of %d packages found", n, total; fflush() }
        /^Installing collected packages/ { printf "\r  %d packages found, unpacking (about a minute) ...", n; fflush() }
        /^ERROR/ { printf "\n%s", $0 }
        END { printf "\n" }'
}

make_environment() {
    local requirements="$1" name="$2" base marker total
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        base="$(find_python)" || fail "Python 3.11 or later was expected, but none was found. Install it, or set PYTHON to where it is."
        echo "Making a virtual environment in $venv with $("$base" --version)"
        rm -rf "$venv"
        "$base" -m venv "$venv" || fail "$base cannot make virtual environments. On Debian and Ubuntu, install the package python3-venv."
    fi
    marker="$venv/.installed-$name"
    if [ "$(cat "$marker" 2>/dev/null)" = "$(hash_requirements "$requirements")" ]; then
        return
    fi
    total="$(cat "$root/requirements.txt" "$requirements" | sort -u | grep -c '==' || true)"
    echo "Installing the packages $name needs (once; a few minutes; the log is $venv/install.log)"
    if ! "$python" -m pip install --disable-pip-version-check --requirement "$requirements" 2>&1 | tee "$venv/install.log" | count_packages "$total"; then
        fail "The packages could not be installed; see $venv/install.log. Run the same command again to continue."
    fi
    hash_requirements "$requirements" >"$marker"
}
