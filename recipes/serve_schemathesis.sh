#!/usr/bin/env bash
# schemathesis against a running server: requests made of /openapi.json, right ones and wrong ones. No answer may be a 5xx, or have a
# status, a type of content or a body that the schema does not tell. About 5 minutes, and one more once for the environment.
#   flashdraft serve --default-max-tokens 8 --max-rows 8 & recipes/serve_schemathesis.sh http://127.0.0.1:8000 [FOLDER]
# SECONDS_OF_FUZZING (240), EXAMPLES of each operation (100), SEED (1), VENV: an environment that has schemathesis already. The server's
# key, if it wants one, is in OPENAI_API_KEY.
set -euo pipefail
url=${1%/} folder=${2:-runs/schemathesis} here=$(cd "$(dirname "$0")" && pwd)
venv=${VENV:-$folder/venv}
mkdir -p "$folder"
if [ ! -x "$venv/bin/schemathesis" ]; then
    python3 -m venv "$venv"
    nice "$venv/bin/pip" install -q "schemathesis==4.32.0"
fi

checks=not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method
# a generated request may well ask for 2,000 tokens: the hooks ask for few
SCHEMATHESIS_HOOKS=$here/serve_schemathesis.py "$venv/bin/schemathesis" run "$url/openapi.json" --checks "$checks" \
    --phases examples,coverage,fuzzing --max-examples "${EXAMPLES:-100}" --max-time "${SECONDS_OF_FUZZING:-240}" --seed "${SEED:-1}" \
    --request-timeout 120 --workers 2 --continue-on-failure --report ndjson --report-ndjson-path "$folder/report.ndjson" \
    ${OPENAI_API_KEY:+-H "Authorization: Bearer $OPENAI_API_KEY"}
