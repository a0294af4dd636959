#!/usr/bin/env bash
# guidellm beside `flashdraft bench serve`: the same prompts of a file, 64 tokens an answer, the same numbers of streams, in turn. Both
# throughputs should agree within 10 %, where guidellm has cores of its own: on two it took 15 to 18 % off. About 3 minutes with the
# built-in model on two cores, and some more once for the environment (6 GB: it wants torch).
#   flashdraft serve & recipes/serve_guidellm.sh http://127.0.0.1:8000 PROMPTS.jsonl [FOLDER]
# PROMPTS: lines with `prompt`, as flashdraft tasks writes them, and 100 of them by default: no request's prompt was asked before.
# STREAMS ("1 8"), REPEATS (2), REQUESTS a stream (4), TOKENIZER (a folder), MODEL, VENV: an environment that has guidellm already.
set -euo pipefail
url=${1%/} prompts=$2 folder=${3:-runs/guidellm} here=$(dirname "$0")
python=${PYTHON:-python3} flashdraft=${FLASHDRAFT:-flashdraft} venv=${VENV:-$folder/venv} tokens=64
tokenizer=${TOKENIZER:-$($python -c 'from flashdraft import hub; print(hub.resolve("smollm2-135m"))')}
model=${MODEL:-$($python -c "from flashdraft.bench.client import Api; print(Api('$url').model(None))")}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$folder"
if [ ! -x "$venv/bin/guidellm" ]; then
    python3 -m venv "$venv"
    nice "$venv/bin/pip" install -q "guidellm==0.8.1"
fi

first=1
rm -f "$folder"/{theirs,ours}-*
for repeat in $(seq "${REPEATS:-2}"); do
    for streams in ${STREAMS:-1 8}; do
        count=$((streams * ${REQUESTS:-4})) name=$streams-$repeat
        own=$folder/prompts-$name.jsonl
        "$python" "$here/serve_guidellm.py" --cut "$prompts" "$first" "$count" "$tokens" > "$own"
        first=$((first + count))
        "$venv/bin/guidellm" run --backend "kind=openai_http,target=$url,model=$model${OPENAI_API_KEY:+,api_key=$OPENAI_API_KEY}" \
            --profile "kind=concurrent,streams=$streams" --constraint "kind=max_requests,count=$count" --data "kind=json_file,path=$own" \
            --tokenizer "kind=hf_auto,model=$tokenizer" --output "kind=json,path=$folder/theirs-$name.json" --disable-console \
            > "$folder/theirs-$name.log" 2>&1 || { tail -20 "$folder/theirs-$name.log"; exit 1; }
        $flashdraft bench serve "$url" --prompts "$own" --out "$folder/ours-$name.jsonl" --concurrency "$streams" --requests "$count" \
            --repeats 1 --drafting none --max-new-tokens "$tokens" --ignore-eos ${REUSE:+--reuse} > "$folder/ours-$name.log"
    done
done
"$python" "$here/serve_guidellm.py" "$folder"
