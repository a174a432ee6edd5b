#!/usr/bin/env bash
# Tests the oldest versions that pyproject.toml declares, in an environment of its own.
#
#   tests/release/floors.sh               all of them: torch and what it needs are a download of 4 GB
#   TORCH=2.13.0 tests/release/floors.sh  all but those of torch and Triton
#
# PYTHON is the interpreter, 3.10 or 3.11: the oldest numpy has no wheels for newer ones.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$folder" # so that the libraries of this tree stay
cd "$folder"

# Not here: vLLM, which has an environment of its own, and the tools that check and document the code.
"${PYTHON:-python3}" - "${TORCH:-}" >oldest.txt <<'END'
import re, sys
torch = sys.argv[1]
others = {"vllm", "sglang", "griffe-sphinx", "mkdocs", "mkdocs-material", "mkdocstrings", "mypy", "pre-commit", "ruff"}
oldest = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\w.]+)', open("pyproject.toml").read()))
oldest |= {"torch": torch} if torch else {}
others |= {"triton"} if torch else set()  # torch asks for the one that is its own
for name in oldest.keys() - others:
    print(f"{name}=={oldest[name]}")
END
cat oldest.txt

"${PYTHON:-python3}" -m venv venv
. venv/bin/activate
export LLM_SAMPLING_CUDA=0
PIP_CONSTRAINT=$PWD/oldest.txt pip install --quiet -r oldest.txt -e '.[cli,tune]'

python -c "
from llm_sampling import backend_info
for row in backend_info():
    print(row.name, row.reason or 'available')
assert [row.name for row in backend_info() if row.available] == ['cpu', 'torch']"
llm-sampling info
pytest=(python -m pytest -q -n 0 -m 'not model and not sweep and not slow and not large and not gpu and not vllm and not sglang and not llama_cpp')
"${pytest[@]}" tests/integrations/test_huggingface.py tests/generation/test_generate.py \
  tests/tools/test_cli.py tests/tools/test_cli_tune.py tests/tools/test_tuning.py
[ -z "${TORCH:-}" ] || exit 0

"${pytest[@]}" tests/sampling/test_{edges,golden,history,masks,ops,params,refusals,sampler,sampler_changes,state}.py \
  tests/kernels/test_triton.py tests/kernels/test_triton_compile.py
