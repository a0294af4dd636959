"""One file per decoding method, network and drafter together; the table of those that have a network of their own."""

from pathlib import Path

from flashdraft import hub
from flashdraft.checkpoint import DraftConfig
from flashdraft.errors import CheckpointError, ModelNotFound
from flashdraft.foreign import is_draft
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.methods.draft_model import CutDraftModel
from flashdraft.methods.eagle3 import Eagle3DraftModel
from flashdraft.methods.medusa import MedusaDraftModel
from flashdraft.network import DraftNetwork

__all__ = ["NETWORKS", "open_network", "shipped"]

_ALL = DFlashDraftModel, Eagle3DraftModel, MedusaDraftModel, CutDraftModel
NETWORKS: dict[str, type[DraftNetwork]] = {network.method: network for network in _ALL}


def shipped(draft: str, target_name: str) -> str:
    """The folder of the drafter shipped for a target where `draft` is a method's name; else `draft` itself."""
    if draft not in NETWORKS:
        return draft
    hub.check_unambiguous(draft, "a method's name")
    folder = hub.builtin_draft(target_name, draft)
    if folder is None:
        raise ModelNotFound(f"no {draft} drafter is shipped for `{target_name}`", hint="give a drafter's folder or hub id")
    return str(folder)


def open_network(draft: str | Path, target_name: str = "") -> DraftNetwork:
    """The draft network of a folder, a hub id or a method's name, of whichever method it is. Raises CheckpointError."""
    name = shipped(str(draft), target_name)
    files = hub.resolve(name)
    config = hub.read_config(files) if isinstance(files, Path) else {}
    if not is_draft(config):
        got = f"`{name}` is not a DFlash drafter, nor one of {', '.join(NETWORKS)}: it is a language model"
        raise CheckpointError(got, hint="give a folder that `flashdraft train` wrote")
    method = DraftConfig.from_json(config, name).method
    if method not in NETWORKS:
        raise CheckpointError(f"`{name}` is a drafter of {method!r}", hint=f"methods are {', '.join(NETWORKS)}")
    return NETWORKS[method].from_pretrained(name)
