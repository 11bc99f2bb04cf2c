#!/usr/bin/env bash
# Create .venv and install the packages of requirements.txt; run again at any time.
# With --test: install the test packages too and run the tests (further words go to pytest).
# With --data: fetch the Quora files into data/ too (URL: of another folder that holds them).
# With --weights: fetch gpt2, gpt2-medium, gpt2-large or gpt2-xl into the Hugging Face cache too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    echo "usage: bash setup.sh [--test [PYTEST ARGUMENTS] | --data [URL] | --weights SIZE]" >&2
    exit 2
}
case "${1:-} $#" in
    " 0" | "--test "* | "--data 1") ;;
    "--data 2" | "--weights 2") [[ $2 == [!-]* ]] || usage ;;
    *) usage ;;
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

if [[ ${1:-} == --test ]]; then
    install -r tests/requirements.txt
    # pyreft asks for old versions of much that its interventions do not need.
    install -qq --no-deps -r tests/requirements-no-deps.txt || echo "No pyreft: its tests are skipped."
    exec .venv/bin/python -m pytest "${@:2}"
fi
if [[ ${1:-} == --data || ${1:-} == --weights ]]; then
    exec .venv/bin/python -m finetune.fetch "${1#--}" "${@:2}"
fi
echo "Ready. Next: .venv/bin/python lora_paraphrase_detection.py --demo"
