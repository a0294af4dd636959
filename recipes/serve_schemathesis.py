"""Of recipes/serve_schemathesis.sh: requests that are answered ask for a few tokens, so that many
requests are made in little time.
"""

import schemathesis

FEW = 8


@schemathesis.hook
def before_call(context, case, kwargs):
    body = case.body
    if not isinstance(body, dict):
        return
    for name in ("max_tokens", "max_completion_tokens"):
        asked = body.get(name)
        if type(asked) is int and asked > FEW:
            body[name] = FEW
