# Sourced by the launchers from the repository root: leaves an environment with the project active.
# An active one (venv or conda) is used, and filled if the project is not in it; otherwise .venv is made and filled.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        echo "making the environment .venv"
        "${PYTHON:-python3}" -m venv .venv
    fi
    . .venv/bin/activate
fi
# The stamp names the checkout and the dependencies, so that a changed pyproject.toml is installed again.
stamp="$(python -c 'import sys; print(sys.prefix)')/functional-dual-anchors.stamp"
wanted="$(pwd) $(cksum < pyproject.toml)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing the project and its dependencies into $VIRTUAL_ENV${CONDA_PREFIX:-} (some minutes, once)"
    python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
    echo "$wanted" > "$stamp"
fi
