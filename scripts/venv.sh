# shellcheck shell=sh disable=SC2154
# Finds a Python and keeps a virtual environment equal to its lock file. Sourced by ./sallyport and scripts/test with
# $root set to the repository; POSIX sh only. What is installed, and how, is in venv.py.

# Whether $1 runs, is new enough and can make an environment. A pyenv shim of a version that is not active does not
# run; Debian keeps ensurepip in a package of its own, python3-venv.
python_works() {
    "$1" -I -c 'import sys; sys.version_info >= (3, 12) or sys.exit(1); import ensurepip, ssl, venv' 2>/dev/null
}

# Prints where the best Python is, 3.13 before others. The real path: what a shim or a link leads to may change.
find_python() {
    pyenv=${PYENV_ROOT:-${HOME:-}/.pyenv}/versions
    for python in python3.13 "$pyenv"/3.13*/bin/python python3.12 "$pyenv"/3.12*/bin/python \
        python3.14 "$pyenv"/3.14*/bin/python python3; do
        if python_works "$python"; then
            "$python" -I -c 'import os, sys; print(os.path.realpath(sys.executable))'
            return
        fi
    done
    return 1
}

# ensure_venv FOLDER LOCK: afterwards FOLDER has a working interpreter and exactly what LOCK lists; or the script ends.
# The copy of LOCK, which venv.py leaves as its last act, tells a finished environment from an interrupted one.
ensure_venv() {
    if cmp -s "$2" "$1/installed.lock" && "$1/bin/python" -I -S -c '' 2>/dev/null; then
        return
    fi
    if ! base_python=$(find_python); then
        found=$(python3 -V 2>/dev/null) || found="no Python 3"
        echo "sallyport: needs Python 3.12 or newer, with venv, but found $found. Install one with" \
            "'apt-get install python3 python3-venv' (Debian 13, Ubuntu 24.04 or newer)," \
            "'brew install python@3.13' (macOS) or 'pyenv install 3.13' (anywhere), then run this again." >&2
        exit 1
    fi
    "$base_python" -I "$root/scripts/venv.py" "$1" "$2" || exit 1
}
