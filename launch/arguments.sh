# shellcheck shell=bash disable=SC2034  # what is set here is read by who sources it
# Sourced by tpu_queued.sh and slurm.sh, after environment.sh: named arguments, and commands that are run or only shown.
#
#   read_arguments "REQUIRED ..." "OPTIONAL ..." "SWITCHES ..." "$@"   --some-name VALUE becomes $some_name, a switch becomes yes;
#                                                                      what follows -- becomes the array $more
#   run COMMAND ...                                                    runs it, or shows it with --dry-run, as a shell would read it

dry_run=""
more=()

# Its own variables begin with an underscore, since arguments are set by their names.
read_arguments() {
    local _required="$1" _optional="$2" _switches="$3" _name _value
    shift 3
    while [ $# -gt 0 ]; do
        if [ "$1" = -- ]; then
            more=("${@:2}")
            break
        fi
        [[ "$1" =~ ^--([a-z][a-z-]*)(=.*)?$ ]] || fail "Argument $1 was not understood; write --NAME VALUE, and what the training gets after --."
        _name="${BASH_REMATCH[1]}"
        _value="${BASH_REMATCH[2]}"
        if [[ " dry-run $_switches " == *" $_name "* ]]; then
            [ -z "$_value" ] || fail "--$_name takes no value."
            printf -v "${_name//-/_}" yes
            shift
            continue
        fi
        [[ " $_required $_optional " == *" $_name "* ]] || fail "--$_name is not known. Known: $_required $_optional $_switches dry-run."
        if [ -n "$_value" ]; then
            _value="${_value#=}"
            shift
        else
            [ $# -gt 1 ] || fail "--$_name needs a value."
            _value="$2"
            shift 2
        fi
        printf -v "${_name//-/_}" %s "$_value"
    done
    for _name in $_required; do
        _value="${_name//-/_}"
        [ -n "${!_value:-}" ] || fail "--$_name is missing."
    done
}

# Words quoted so that a shell reads the same words again.
quoted() {
    printf '%q ' "$@" | sed 's/ $//'
}

run() {
    if [ -n "$dry_run" ]; then
        quoted "$@"
        echo
    else
        "$@"
    fi
}

# check NAME PATTERN WHAT: fails unless the variable NAME matches.
check() {
    local value="${!1}"
    [[ "$value" =~ ^($2)$ ]] || fail "--${1//_/-} must be $3, not '$value'."
}
