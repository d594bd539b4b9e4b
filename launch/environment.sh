# Sourced by the scripts beside it: a virtual environment with gidef in it. Needs only Python 3.11 to 3.13.
# GIDEF_VENV: its folder (default .venv).  PYTHON: the interpreter that makes it.
# gidef_environment EXTRA: installs gidef, with the named extra if one is given, unless that was done before from the same pyproject.toml.
# gidef_activate EXTRA: the environment that is active if gidef runs in it, else gidef_environment's.

gidef_environment() {
    local extra="${1:-}" venv="${GIDEF_VENV:-$PWD/.venv}" python candidate stamp
    stamp="$venv/.gidef-${extra:-plain}"
    if [ ! -x "$venv/bin/python" ]; then
        python=""
        for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
            if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
                python="$candidate"
                break
            fi
        done
        if [ -z "$python" ]; then
            echo "gidef needs Python 3.11, 3.12 or 3.13; none was found. Install one, or set PYTHON to its path." >&2
            return 1
        fi
        echo "Making a virtual environment in $venv with $("$python" --version)"
        "$python" -m venv "$venv" || return 1
    fi
    if ! cmp -s pyproject.toml "$stamp"; then
        echo "Installing gidef and PyTorch into $venv (several GB the first time, a few minutes)"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}" || return 1
        cp pyproject.toml "$stamp"
    fi
    export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
}

gidef_activate() {
    (cd / && python -c 'import importlib.util as u, sys; sys.exit(None in map(u.find_spec, sys.argv[1:]))' gidef torch timm tyro "$@") 2>/dev/null \
        || gidef_environment "$@"
}
