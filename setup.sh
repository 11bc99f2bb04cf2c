#!/usr/bin/env bash
# Install the scripts' dependencies into .venv; --help lists the options and other platforms.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage="usage: bash setup.sh [--no-venv] [--test [PYTEST ARGUMENTS] | --data [URL] | --weights SIZE]"
help="$usage

Create .venv, install the packages in requirements.txt into it, then do what the option says. The
largest package by far is PyTorch: several GB on Linux, including the CUDA libraries. The script can
be rerun at any time, and then installs only what is missing.

  --no-venv                  install into the current Python instead of .venv
  --test [PYTEST ARGUMENTS]  also install the test packages and run the tests
  --data [URL]               also download the Quora files (about 65 MB) to data/, from the course's
                             repository or from the folder at URL
  --weights SIZE             also download a model to the Hugging Face cache: gpt2 (0.5 GB),
                             gpt2-medium (1.5 GB), gpt2-large (3.2 GB) or gpt2-xl (6.4 GB)
  -h, --help                 show this text and exit

The environment variable PYTHON selects the Python to use, 3.10 or newer [python3].

  conda    conda create -n gpt2 python=3.12 && conda activate gpt2 && bash setup.sh --no-venv
  Colab    !bash setup.sh --no-venv     then restart the runtime if PyTorch was already imported
  Windows  use WSL (wsl --install), then as on Linux"

refuse() {
    echo "$usage" >&2
    exit 2
}
fail() {
    echo "setup.sh: $1" >&2
    exit 1
}
venv=1
if [[ ${1:-} == --no-venv ]]; then
    venv=
    shift
fi
case "${1:-} $#" in
    " 0" | "--test "* | "--data 1") ;;
    "--data 2" | "--weights 2") [[ $2 == [!-]* ]] || refuse ;;
    "-h 1" | "--help 1") echo "$help" && exit ;;
    *) refuse ;;
esac
case "$(uname -s)" in
    MINGW* | MSYS* | CYGWIN*) fail "the project does not run in this Windows shell; use WSL" ;;
esac
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or newer is required; set PYTHON=/path/to/python to select it"
if [[ $venv ]]; then
    "$python" -m venv .venv || fail "$python cannot create a virtual environment: install \
python3-venv (on Debian and Ubuntu), or use --no-venv"
    python=.venv/bin/python
fi

install() {
    local quiet=--quiet
    [[ -t 1 ]] && quiet= # a terminal shows pip's progress
    "$python" -m pip install $quiet --disable-pip-version-check "$@"
}
need() {
    install "$@" || fail "pip could not install the packages; if it found no version of a package, \
check the network (or the proxy) and run this again"
}
# torch first, with its exact version, so that no other package pulls in a different build.
need "$(grep '^torch==' requirements.txt)"
need -r requirements.txt

case "${1:-}" in
    --test)
        need -r tests/requirements.txt
        # pyreft requires old versions of many packages that its interventions do not need.
        install -qq --no-deps -r tests/requirements-no-deps.txt ||
            echo "pyreft could not be installed; its tests are skipped."
        exec "$python" -m pytest "${@:2}"
        ;;
    --data) exec "$python" -m data.fetch quora "${@:2}" ;;
    --weights) exec "$python" -m data.fetch weights "$2" ;;
esac
echo "Ready. Next: $python lora_paraphrase_detection.py --demo"
