"""The shipped draft model as a whole Hugging Face folder, with its target's embedding and tokenizer, for transformers' own loop.

python recipes/assistant.py runs/assistant
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from flashdraft import hub

target, draft, out = (
    hub.resolve("smollm2-135m"),
    hub.builtin_draft("smollm2-135m", "draft_model"),
    Path(sys.argv[1]),
)
if out.exists() and any(out.iterdir()):
    sys.exit(f"`{out}` is not empty: name a new folder")
embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
config = json.loads((target / "config.json").read_text())
config["num_hidden_layers"] = json.loads((draft / "config.json").read_text())["num_hidden_layers"]
weights = {
    f"model.{name}": tensor.to(embedding.dtype)
    for name, tensor in load_file(draft / "model.safetensors").items()
}
shutil.copytree(target, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
save_file(
    weights | {"model.embed_tokens.weight": embedding},
    out / "model.safetensors",
    metadata={"format": "pt"},
)
(out / "config.json").write_text(json.dumps(config, indent=2))
