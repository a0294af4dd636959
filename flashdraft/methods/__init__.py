"""One file per decoding method, network and drafter together; the table of those that have a network of their own."""

from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.methods.draft_model import CutDraftModel
from flashdraft.methods.eagle3 import Eagle3DraftModel
from flashdraft.methods.medusa import MedusaDraftModel
from flashdraft.network import DraftNetwork

__all__ = ["NETWORKS"]

_ALL = DFlashDraftModel, Eagle3DraftModel, MedusaDraftModel, CutDraftModel
NETWORKS: dict[str, type[DraftNetwork]] = {network.method: network for network in _ALL}
