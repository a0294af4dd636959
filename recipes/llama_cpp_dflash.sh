#!/usr/bin/env bash
# llama.cpp with its own DFlash and our drafter, beside llama.cpp without it and beside ours, in turn prompt by prompt.
#   FLASHDRAFT_DATA=<folder with gsm8k/, humaneval/, mt_bench/>  recipes/llama_cpp_dflash.sh [RESULTS_FOLDER]
# Needs cmake and a C++ compiler. LLAMA_CPP=FOLDER is a source of llama.cpp of June 2026 or later; without it the one inside llama-cpp-python 0.3.36 is fetched.
# DRAFT=FOLDER measures another drafter than the shipped one; llama.cpp gets it in the plain format, without head and reduced vocabulary.
set -euo pipefail
results=${1:-runs/peers}
: "${FLASHDRAFT_DATA:?set FLASHDRAFT_DATA to the folder of the evaluation sets}"
flashdraft=${FLASHDRAFT:-flashdraft} python=${PYTHON:-python3} here=$(dirname "$0")
mkdir -p "$results"

. "$here/llama_server.sh"

if [ ! -s "$results/draft.gguf" ]; then # the converter reads our environment's torch and transformers
    target=$($python - "$results/plain" "${DRAFT:-}" << 'END'
import sys

from flashdraft import DFlashDraftModel, hub

plain, draft = sys.argv[1:]
DFlashDraftModel.from_pretrained(draft or hub.builtin_draft("smollm2-135m")).save_pretrained(plain, plain=True)
print(hub.resolve("smollm2-135m"))
END
    )
    for width in f32 q8_0; do
        [ -s "$results/$width.gguf" ] || $python "$LLAMA_CPP/convert_hf_to_gguf.py" "$target" --outtype $width --outfile "$results/$width.gguf"
    done
    $python "$LLAMA_CPP/convert_hf_to_gguf.py" "$results/plain" --target-model-dir "$target" --outtype "${DRAFT_TYPE:-bf16}" --outfile "$results/draft.gguf"
fi

$flashdraft tasks --data "$FLASHDRAFT_DATA" --ids "$here/bench_ids.json" --first "${FIRST:-8}" --out "$results/prompts.jsonl"
beside() {  # width, our methods, options; llama.cpp's default are 3 drafts a step, the whole block has 5
    local out=$results/llama_dflash_$1.jsonl name="llama.cpp $1" engine=$here/engines.py:llama_server:$results/$1.gguf
    local drafting=$engine+$results/draft.gguf
    [ -e "$out" ] || $flashdraft bench --prompts "$results/prompts.jsonl" --out "$out" --max-new-tokens 128 --repeats "${REPEATS:-1}" "${@:3}" \
        ${DRAFT:+--draft "$DRAFT"} --methods "$2,$name=$engine,$name DFlash 3=$drafting+3,$name DFlash 5=$drafting+5" > "$results/llama_dflash_$1.log"
    $flashdraft report "$out"
    $flashdraft report "$out" --base "$name"
}
beside f32 autoregressive,dflash --kernel float32  # without kernels in the names `identical` compares llama.cpp's texts with ours too
beside q8_0 autoregressive:int8,dflash:int8  # each is a target of its own
