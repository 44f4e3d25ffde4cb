# Sourced by the launchers from the repository root: leaves an environment with the project active.
# An active one (venv or conda) is used, and filled if the project is not in it; otherwise .venv is made and filled.
# The versions are those that were tested, scripts/constraints.txt; with FDA_LATEST=1 the newest that pip finds.
case "${FDA_LATEST:-}" in
    "") chosen=tested versions="--constraint scripts/constraints.txt" ;;
    1) chosen=newest versions="--upgrade --upgrade-strategy eager" ;;
    *) echo "environment.sh: FDA_LATEST is '$FDA_LATEST'; 1 takes the newest versions, unset the tested ones" >&2; exit 2 ;;
esac
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        echo "making the environment .venv"
        "${PYTHON:-python3}" -m venv .venv
    fi
    . .venv/bin/activate
fi
# The stamp names the checkout, the dependencies and their versions, so that what changed is installed again.
stamp="$(python -c 'import sys; print(sys.prefix)')/functional-dual-anchors.stamp"
wanted="$(pwd) $chosen $(cat pyproject.toml scripts/constraints.txt | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing the project and its dependencies, $chosen versions, into ${VIRTUAL_ENV:-$CONDA_PREFIX} (some minutes, once)"
    # shellcheck disable=SC2086  # several words
    python -m pip install --quiet --disable-pip-version-check $versions --editable '.[dev]'
    echo "$wanted" > "$stamp"
fi
