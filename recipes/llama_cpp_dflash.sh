#!/usr/bin/env bash
# llama.cpp with our drafters, exported, beside llama.cpp without them and beside ours, in turn prompt by prompt.
#   FLASHDRAFT_DATA=<folder with gsm8k/, humaneval/, mt_bench/>  recipes/llama_cpp_dflash.sh [RESULTS_FOLDER]
# Needs cmake and a C++ compiler, and sentencepiece, which llama.cpp's converter of targets imports. LLAMA_CPP=FOLDER is a source of
# llama.cpp of October 2026 or later; without it the one inside llama-cpp-python 0.3.36 is fetched.
# DRAFTS="DRAFT ...": drafters of the built-in target, of DFlash v1, DFlash 2 or DSpark; by default the shipped one, whose head stays here.
# DTYPE: of their weights in llama.cpp's file, by default as they are stored. WIDTHS: of the target, "f32 q8_0".
set -euo pipefail
results=${1:-runs/peers}
: "${FLASHDRAFT_DATA:?set FLASHDRAFT_DATA to the folder of the evaluation sets}"
flashdraft=${FLASHDRAFT:-flashdraft} python=${PYTHON:-python3} here=$(dirname "$0")
mkdir -p "$results"

. "$here/llama_server.sh"

target=$($python -c 'from flashdraft import hub; print(hub.resolve("smollm2-135m"))')
for width in ${WIDTHS:-f32 q8_0}; do # the converter reads our environment's torch and transformers
    [ -s "$results/$width.gguf" ] || $python "$LLAMA_CPP/convert_hf_to_gguf.py" "$target" --outtype "$width" --outfile "$results/$width.gguf"
done
$flashdraft tasks --data "$FLASHDRAFT_DATA" --ids "$here/bench_ids.json" --first "${FIRST:-8}" --out "$results/prompts.jsonl"

beside() {  # width, our methods, options; of the drafter that is exported. llama.cpp's default are 3 drafts a step
    local engine=$here/engines.py:llama_server:$results/$1.gguf name="llama.cpp $1" out=$results/llama_${short}_$1.jsonl
    local drafting=$engine+$results/$short/draft.gguf
    [ -e "$out" ] || $flashdraft bench --prompts "$results/prompts.jsonl" --out "$out" --max-new-tokens 128 --repeats "${REPEATS:-1}" "${@:3}" \
        --draft "$draft" --methods "$2,$name=$engine,$name drafts 3=$drafting+3+$kind,$name drafts $most=$drafting+$most+$kind" \
        > "$results/llama_${short}_$1.log"
    $flashdraft report "$out"
    $flashdraft report "$out" --base "$name"
}
for draft in ${DRAFTS:-dflash}; do
    short=$(basename "$draft")
    told=$($flashdraft export "$draft" --to llamacpp --target smollm2-135m --dtype "${DTYPE:-auto}" --out "$results/$short")
    echo "$told"
    kind=${told##*--spec-type } most=${told##* } # the command's last words: --spec-type KIND --spec-draft-n-max MOST
    kind=${kind%% *}
    for width in ${WIDTHS:-f32 q8_0}; do
        case $width in
        f32) beside f32 autoregressive,dflash --kernel float32 ;; # so `identical` compares llama.cpp's texts with ours, too
        *) beside "$width" autoregressive:int8,dflash:int8 ;;      # a target of its own
        esac
    done
done
