"""What changes the weights: AdamW, or Muon for the matrices and AdamW for the rest.

Does not know losses, steps or checkpoints.
"""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from flashdraft.methods.network import DraftNetwork
from flashdraft.train.config import TrainConfig
from flashdraft.train.muon import Muon

__all__ = ["new_optimizers"]

_TABLES = ("codebook", "markov_w1.weight", "markov_w2.weight")  # a row a token
_IDENTITIES = ("base_kernel",)  # they begin at the identity
_BETAS = (0.9, 0.95)


def new_optimizers(model: DraftNetwork, config: TrainConfig) -> list[Optimizer]:
    """Those that together move every parameter of the network."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.endswith(_TABLES + _IDENTITIES):
            matrices.append(parameter)
        else:
            others.append(parameter)
    decay = config.weight_decay
    if config.optimizer == "adamw":
        return [_adamw([_group(matrices, decay), _group(others, 0.0)], config)]

    flat = [parameter for parameter in matrices if parameter.ndim == 2]
    deep = [parameter for parameter in matrices if parameter.ndim > 2]  # Muon takes none
    rest = [_group(deep, decay), _group(others, 0.0)]
    muon = Muon(flat, lr=config.lr, weight_decay=decay)
    return [muon, _adamw(rest, config)]


def _group(parameters: list[nn.Parameter], decay: float) -> dict[str, Any]:
    """Norms and biases do not decay, nor do tables, which would fade where a token is rare."""
    return {"params": parameters, "weight_decay": decay}


def _adamw(groups: list[dict[str, Any]], config: TrainConfig) -> Optimizer:
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=config.lr, betas=_BETAS, fused=True)
