#!/usr/bin/env bash
# lm-eval against a running server: a generation task with drafting off and on, and a loglikelihood task, on GSM8K from a folder; the
# scores and all answers must be equal. About 2 minutes with the built-in model on two cores, and as much once for the environment.
#   flashdraft serve & FLASHDRAFT_DATA=<folder with gsm8k/>  recipes/serve_lm_eval.sh http://127.0.0.1:8000 [FOLDER]
# LIMIT: questions of each task (20). TOKENIZER: folder of the served model's tokenizer, by default the built-in model's.
# A key, if the server wants one, is in OPENAI_API_KEY. VENV: an environment that has lm-eval already.
set -euo pipefail
url=${1%/} folder=${2:-runs/lm_eval} here=$(dirname "$0")
: "${FLASHDRAFT_DATA:?set FLASHDRAFT_DATA to the folder of the evaluation sets}"
export FLASHDRAFT_DATA OPENAI_API_KEY=${OPENAI_API_KEY:-none} HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=$folder/datasets TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3} venv=${VENV:-$folder/venv} limit=${LIMIT:-20}
tokenizer=${TOKENIZER:-$($python -c 'from flashdraft import hub; print(hub.resolve("smollm2-135m"))')}
model=${MODEL:-$($python -c "from flashdraft.bench.client import Api; print(Api('$url').model(None))")}
mkdir -p "$folder"
if [ ! -x "$venv/bin/lm-eval" ]; then # its tokenizer is read by transformers, which needs no torch for that
    python3 -m venv "$venv"
    nice "$venv/bin/pip" install -q "lm-eval[api]==0.4.13" "transformers>=5,<6"
fi

ask() { # name, task, generation options
    local served="base_url=$url/v1/completions,model=$model,tokenizer=$tokenizer,tokenizer_backend=huggingface,num_concurrent=4,max_length=2048"
    rm -rf "$folder/$1"
    "$venv/bin/lm-eval" run --model local-completions --model_args "$served" --include_path "$here/lm_eval" --tasks "$2" --limit "$limit" \
        --log_samples --output_path "$folder/$1" "${@:3}" > "$folder/$1.log" 2>&1 || { tail -20 "$folder/$1.log"; exit 1; }
}
ask texts-off flashdraft_gsm8k_texts --gen_kwargs drafting=off
ask texts-on flashdraft_gsm8k_texts --gen_kwargs drafting=on
ask choices-1 flashdraft_gsm8k_choices # a loglikelihood is of given tokens: nothing is drafted
ask choices-2 flashdraft_gsm8k_choices
"$python" "$here/serve_lm_eval.py" "$folder/texts-off" "$folder/texts-on"
"$python" "$here/serve_lm_eval.py" "$folder/choices-1" "$folder/choices-2" "$tokenizer" # and they are what transformers says
