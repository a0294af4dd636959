"""Drafters that differ in their reduced vocabulary alone: the commonest tokens of the training answers, the weights unchanged.

python recipes/vocabulary.py FOLDER_OR_NAME FEATURES OUT 1024 2048 4096
flashdraft bench --prompts PROMPTS --out vocabulary.jsonl --methods autoregressive,dflash,v1024=OUT/1024,v2048=OUT/2048
"""

import sys
from pathlib import Path

from flashdraft import hub
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.train.features import FeatureSet
from flashdraft.train.objectives import common_tokens

draft, features, out, *counts = sys.argv[1:]
data = FeatureSet(Path(features))
for count in map(int, counts):
    model = DFlashDraftModel.from_pretrained(
        draft if Path(draft).exists() else hub.builtin_draft(draft, "dflash")
    )
    tokens, covered = common_tokens(data, count)
    model.reduce_vocabulary(tokens)
    model.save_pretrained(Path(out) / str(count))
    print(f"{count} tokens: {covered:.2%} of the answers")
