# Sourced by the other scripts: the virtual environment in .venv, installed again only when
# pyproject.toml has changed. Expects the repository root as the working directory.

say() { echo "klong: $*" >&2; }
fail() { say "$*"; exit 1; }

# install_into_venv EXTRAS: EXTRAS is "" or "[dev]".
install_into_venv() {
    local extras=$1 python=${PYTHON:-python3} want stamp log=.venv/install.log
    want=$(sha256sum pyproject.toml | cut -d' ' -f1)
    for stamp in ".venv/installed$extras" ".venv/installed[dev]"; do
        if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then return; fi
    done
    command -v "$python" >/dev/null || fail "there is no $python: apt-get install python3 python3-venv"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version) is too old: install Python 3.11 or later, or set PYTHON to one"
    if [ ! -x .venv/bin/pip ]; then
        "$python" -c 'import ensurepip' 2>/dev/null ||
            fail "Python cannot make virtual environments here: apt-get install" \
                "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
        say "making .venv"
        "$python" -m venv --clear .venv
    fi
    say "installing klong-jax$extras into .venv (the first time takes some minutes)"
    .venv/bin/pip install --disable-pip-version-check --progress-bar off -e ".$extras" 2>&1 |
        tee "$log" | awk '/^ *Downloading|^ *Processing|^Installing coll/ {print "  " $1, $2; fflush()}' >&2 ||
        { tail -n 20 "$log" >&2; fail "the installation failed; $log has all of it"; }
    echo "$want" >".venv/installed$extras"
}
