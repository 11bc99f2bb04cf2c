#!/usr/bin/env bash
# Create .venv and install what the scripts need; --help lists the options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage="usage: bash setup.sh [--test [PYTEST ARGUMENTS] | --data [URL] | --weights SIZE]"
help="$usage

Create .venv and install the packages of requirements.txt. It may be run again at any time.

  --test [PYTEST ARGUMENTS]  also install the test packages, and run the tests
  --data [URL]               also fetch the Quora files into data/, from the course's repository
                             or from the folder at URL
  --weights SIZE             also fetch gpt2, gpt2-medium, gpt2-large or gpt2-xl into the
                             Hugging Face cache
  -h, --help                 show this text and do nothing else

The environment variable PYTHON names the Python to use, 3.10 or newer [python3]."

refuse() {
    echo "$usage" >&2
    exit 2
}
case "${1:-} $#" in
    " 0" | "--test "* | "--data 1") ;;
    "--data 2" | "--weights 2") [[ $2 == [!-]* ]] || refuse ;;
    "-h 1" | "--help 1") echo "$help" && exit ;;
    *) refuse ;;
esac
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "setup.sh needs Python 3.10 or newer; name it with PYTHON=/path/to/python" >&2
    exit 1
fi
if ! "$python" -m venv .venv; then
    echo "setup.sh: $python cannot make a virtual environment (on Debian: install python3-venv)" >&2
    exit 1
fi

install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
# torch first and by its exact version, so that no other package draws in another build.
install "$(grep '^torch==' requirements.txt)"
install -r requirements.txt

case "${1:-}" in
    --test)
        install -r tests/requirements.txt
        # pyreft asks for old versions of much that its interventions do not need.
        install -qq --no-deps -r tests/requirements-no-deps.txt ||
            echo "No pyreft: its tests are skipped."
        exec .venv/bin/python -m pytest "${@:2}"
        ;;
    --data) exec .venv/bin/python -m data.fetch quora "${@:2}" ;;
    --weights) exec .venv/bin/python -m data.fetch weights "$2" ;;
esac
echo "Ready. Next: .venv/bin/python lora_paraphrase_detection.py --demo"
