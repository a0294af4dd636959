"""The shipped draft model as a whole Hugging Face folder, for transformers' own loop.

python recipes/assistant.py runs/assistant

It has its target's embedding and tokenizer.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from flashdraft import hub

target = hub.resolve("smollm2-135m")
draft = hub.builtin_draft("smollm2-135m", "draft_model")
out = Path(sys.argv[1])
if out.exists() and any(out.iterdir()):
    sys.exit(f"`{out}` is not empty: name a new folder")

draft_config = json.loads((draft / "config.json").read_text())
config = json.loads((target / "config.json").read_text())
config["num_hidden_layers"] = draft_config["num_hidden_layers"]

embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
weights = {}
for name, tensor in load_file(draft / "model.safetensors").items():
    weights[f"model.{name}"] = tensor.to(embedding.dtype)
weights["model.embed_tokens.weight"] = embedding

shutil.copytree(target, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
(out / "config.json").write_text(json.dumps(config, indent=2))
