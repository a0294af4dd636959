"""Drafters that differ in their reduced vocabulary alone; the weights are unchanged.

python recipes/vocabulary.py FOLDER_OR_NAME FEATURES OUT 1024 2048 4096
flashdraft bench --prompts PROMPTS --out vocabulary.jsonl \\
    --methods autoregressive,dflash,v1024=OUT/1024,v2048=OUT/2048

A vocabulary is the commonest tokens of the training answers.
"""

import sys
from pathlib import Path

from flashdraft import hub
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.train.features import FeatureSet
from flashdraft.train.objectives import common_tokens

draft, features, out, *counts = sys.argv[1:]
folder = draft if Path(draft).exists() else hub.builtin_draft(draft, "dflash")
data = FeatureSet(Path(features))
for text in counts:
    count = int(text)
    model = DFlashDraftModel.from_pretrained(folder)
    common = common_tokens(data, count)
    model.reduce_vocabulary(common.tokens)
    model.save_pretrained(Path(out) / str(count))
    print(f"{count} tokens: {common.covered:.2%} of the answers")
