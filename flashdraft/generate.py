"""The ten-line experience: `load` a target with its drafter, then `generate` or `stream`.

The stream is the primitive: `generate` collects it, and the command line and the benchmark read the same records.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch

from flashdraft import hub
from flashdraft.control import Control
from flashdraft.ending import end_tokens
from flashdraft.engine import Engine, Request, check
from flashdraft.errors import FlashDraftError, InvalidParameter, InvalidPrompt, first_line
from flashdraft.files import parse_json
from flashdraft.foreign import is_draft
from flashdraft.lean import FAMILIES, LeanTarget, fastest, unfit
from flashdraft.methods import NETWORKS, open_network, shipped
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.draft_model import DraftModelDrafter, check_tokenizers
from flashdraft.methods.prompt_lookup import PromptLookup
from flashdraft.methods.union import Union
from flashdraft.pretrained import Source, check_folder, check_tokenizer, read_model, read_tokenizer
from flashdraft.process import new_lock, undisturbed
from flashdraft.prompt import as_asked, is_one, rendered
from flashdraft.target import HFTarget, Target
from flashdraft.text import TextDecoder
from flashdraft.types import COUNTS, Allowed, Chunk, Drafter, SamplingParams, as_number, check_option, require

__all__ = ["Model", "Prompt", "drafters", "load", "load_target", "union_parts"]

Prompt = str | Sequence[dict[str, str]] | Sequence[int]  # one user turn, a conversation, or token ids as they are
Prompts = Prompt | Sequence[Prompt]
Params = SamplingParams | Sequence[SamplingParams] | None
Size = int | None
Loaded = tuple[Target, Any, frozenset[int]]
KERNELS = ("auto", "compact", "float32", "int8", "torch", "compiled", "transformers")
_MEASURING = new_lock()  # steps of two threads at once would measure each other
_HOW = ("device", "dtype", "kernel")  # of `load`, for its target
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
MOST_NODES = 1024  # of a proposal: its masks and states are square in them


@dataclass(eq=False, repr=False)
class Model:
    """A target, its tokenizer and a drafter, ready to generate."""

    target: Target
    tokenizer: Any
    new_drafter: Callable[[], Drafter]  # every stream has a drafter of its own; the weights are shared
    eos: frozenset[int] = field(kw_only=True)
    max_rows: int = field(kw_only=True)
    adaptive: bool = field(default=False, kw_only=True)  # as many nodes are read as pay, where the target's step times are known

    @cached_property
    def control(self) -> Control | None:
        """Of all streams: what was learned in one serves the next. See Engine."""
        with _MEASURING:
            if "control" not in vars(self):  # another thread may have been first
                seconds = self.target.step_seconds if self.adaptive else None
                vars(self)["control"] = Control(seconds) if seconds else None
            made: Control | None = vars(self)["control"]
            return made

    def __copy__(self) -> Self:
        return replace(self)

    def __reduce__(self) -> Any:
        got = "a Model cannot be pickled or copied deeply: it holds packed weights where they lie in this process"
        raise FlashDraftError(got, hint="call flashdraft.load in every process that shall generate")

    def generate(self, prompts: Prompts, params: Params = None, **options: Any) -> Any:
        """The Result of one prompt, or a list of Results in the order of a list of prompts.

        params: one for all, or one per prompt; `options` are the fields of SamplingParams, as a shorthand.
        Raises InvalidParameter, InvalidPrompt or ContextLengthError before anything runs.
        """
        results = {c.index: c.result for c in self.stream(prompts, params, **options) if c.result is not None}
        ordered = [results[index] for index in sorted(results)]
        return ordered[0] if is_one(prompts) else ordered

    def stream(self, prompts: Prompts, params: Params = None, **options: Any) -> Iterator[Chunk]:
        """One Chunk per prompt and step, as they come; a prompt's last one carries its Result."""
        batch = [prompts] if is_one(prompts) else list(prompts)
        rows = min(self.max_rows, max(len(batch), 1))
        engine = Engine(self.target, self.new_drafter(), max_rows=rows, control=self.control)
        pairs: Any = zip(batch, _params(params, options, len(batch)), strict=True)
        requests = [self.request(prompt, one, index=i) for i, (prompt, one) in enumerate(pairs)]
        for request in requests:
            check(self.target, request)
        return _run(engine, requests)

    def request(self, prompt: Prompt, params: SamplingParams, *, index: int = 0) -> Request:
        """A prompt as the engine takes it."""
        return Request(self.encode(prompt), params, TextDecoder(self.tokenizer, params.stop), self.eos, index)

    def encode(self, prompt: Prompt, *, thinking: bool | None = None) -> list[int]:
        """Token ids of a prompt; a string becomes one user turn where the tokenizer has a chat template.

        thinking: the template's `enable_thinking`; None leaves it as the template has it. A template without it is refused.
        """
        asked = as_asked(prompt)
        if not isinstance(asked, str) and isinstance(asked[0], int):
            return self._checked(asked)

        template = getattr(self.tokenizer, "chat_template", None)
        if thinking is not None and "enable_thinking" not in str(template):
            refused = f"the chat template of `{self.target.name}` has no `enable_thinking`"
            raise InvalidPrompt(refused, hint="leave `thinking` out of the prompts")
        if template:
            switch = {} if thinking is None else {"enable_thinking": thinking}
            turns: Any = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
            text = rendered(self.tokenizer, self.target.name, turns, **switch)
            return self._tokens(text, add_special_tokens=False)
        if not isinstance(asked, str):
            raise InvalidPrompt(f"`{self.target.name}` has no chat template for a conversation", hint="give the prompt as text")
        return self._tokens(asked, add_special_tokens=True)

    def _tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidPrompt("the prompt holds half a character (a lone surrogate)", hint="send text in UTF-8") from None
        return self._checked(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _checked(self, tokens: list[int]) -> list[int]:
        if wrong := [token for token in tokens if not 0 <= token < self.target.vocab_size]:
            raise InvalidPrompt(f"token id {wrong[0]} is outside the vocabulary of {self.target.vocab_size}")
        return tokens


def _run(engine: Engine, requests: list[Request]) -> Iterator[Chunk]:
    waiting = list(reversed(requests))
    try:
        while waiting or engine.running:
            while waiting and engine.num_free:
                yield engine.admit(waiting.pop())
            if engine.running:
                yield from engine.step()
    finally:  # a caller that stops listening frees its rows
        for request in requests:
            engine.abort(request.index)


def _params(params: Params, options: dict[str, Any], count: int) -> list[SamplingParams]:
    known = {field.name for field in fields(SamplingParams)}
    if unknown := sorted(set(options) - known):
        raise InvalidParameter(f"unknown option `{unknown[0]}`", hint=f"options are {', '.join(sorted(known))}")
    if params is not None and options:
        raise InvalidParameter("got both `params` and separate options", hint="put them all into one SamplingParams")
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams(**options)] * count
    if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
        hint = "give SamplingParams, one for all or a list with one per prompt, or options by name"
        raise InvalidParameter(f"params is {params!r:.60}", hint=hint)
    if len(params) != count:
        got = f"got {len(params)} SamplingParams for {count} prompts"
        raise InvalidParameter(got, hint="give one for all, or one per prompt")
    return list(params)


def load(
    target: str | Path = "smollm2-135m",
    *,
    draft: str | Path = "auto",
    block_size: Size = None,
    tree_nodes: Size = None,
    max_rows: int = 8,
    **how: str,
) -> Model:
    """A target by built-in name, hub id, folder or GGUF file, with a drafter, ready to generate.

    draft: "auto" (the drafter shipped for this target, or none), "autoregressive", "prompt_lookup", a drafter's folder or hub id
    (its config says which method it is of), a smaller causal LM with the same tokenizer, "dflash", "eagle3", "medusa" or
    "draft_model" for the one that is shipped, or two of these joined by +, whose proposals become one tree.
    block_size: nodes per proposal, the anchor included; by default as many of what the drafter was trained for as pay.
    tree_nodes: the draft network proposes a tree of so many nodes; None: a chain. how: `device`, "cpu" by default;
    `dtype`, "auto" (as stored), "float32", "bfloat16" or "float16"; `kernel`, what runs a float32 target on a CPU: "auto" (the
    fastest exact one, measured once a machine), "compact" (the same numbers in fewer bytes), "float32", "torch",
    "transformers", or "int8", which rounds weights and activations and so makes another target. "torch" and "compiled" (static
    shapes for CUDA graphs, docs/gpu.md) run llama-shaped targets in any dtype on any device.
    Raises a FlashDraftError that says what to do.
    """
    max_rows, block_size, tree_nodes = map(as_number, (max_rows, block_size, tree_nodes))
    if unknown := sorted(how.keys() - _HOW):
        raise InvalidParameter(f"unknown option `{unknown[0]}`", hint=f"options are {', '.join(_HOW)}")
    check_option("max_rows", max_rows, int, COUNTS)
    _check_sizes(block_size, tree_nodes)
    name = _name_of(target)
    loaded, tokenizer, eos = load_target(name, **how)
    new_drafter = drafters(draft, loaded, name, block_size, tree_nodes, tokenizer=tokenizer)
    adaptive = block_size is None and draft != "autoregressive"
    return Model(loaded, tokenizer, new_drafter, eos=eos, max_rows=max_rows, adaptive=adaptive)


def _name_of(given: str | Path) -> str:
    """A Path is the folder itself, also where it is called as something that is known by name."""
    name = str(given)
    known = (*hub.BUILTIN, *NETWORKS)
    return f"./{name}" if isinstance(given, Path) and name in known else name


@undisturbed
def load_target(name: str, *, device: str = "cpu", dtype: str = "auto", kernel: str = "auto") -> Loaded:
    """The target, its tokenizer and its end-of-text ids; see `load`. Raises InvalidParameter for a kernel that cannot run it."""
    require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
    require(kernel in KERNELS, "kernel", kernel, f"one of {', '.join(KERNELS)}")
    device = _device_name(device)
    files = hub.resolve(name)
    gguf = files.filename if isinstance(files, hub.GgufFile) else None
    source = Source(name, files.folder if isinstance(files, hub.GgufFile) else files, gguf)
    if gguf is None:
        check_folder(source)
    tokenizer = read_tokenizer(source)
    model = read_model(source, dtype=dtype)
    check_tokenizer(source, tokenizer, int(model.get_input_embeddings().weight.shape[0]))
    try:
        model.to(torch.device(device))
    except (RuntimeError, AssertionError, ValueError) as error:  # torch was built without it; a quantised model that stays
        raise _device_refused(device, error) from None
    stated = _stated_configs(files) if isinstance(files, Path) else [{"eos_token_id": model.generation_config.eos_token_id}]
    odd = unfit(model)
    stored = model.dtype
    ours = kernel != "transformers" and (device == "cpu" or kernel in ("torch", "compiled"))
    lean = ours and odd is None
    if lean and kernel == "auto":
        quick = fastest(model, name, consume=True)
        if quick is None:  # the model's weights are gone
            return load_target(name, device=device, dtype=dtype, kernel="torch")
        return quick, tokenizer, end_tokens(stated, tokenizer, quick.vocab_size)
    made = LeanTarget(model, name, kernel=kernel, consume=True) if lean else HFTarget(model, name)
    if kernel not in ("auto", made.kernel_name):
        raise _kernel_refused(kernel, made, odd, stored, device)
    return made, tokenizer, end_tokens(stated, tokenizer, made.vocab_size)


def _device_name(given: Any) -> str:
    """A device as torch writes it; the CPU has one name, however it was given. Raises InvalidParameter for what is none."""
    require(isinstance(given, (str, int, torch.device)), "device", given, "cpu, cuda, cuda:1, mps")
    try:
        device = torch.device(given)
    except RuntimeError as error:  # torch was built without it
        raise _device_refused(given, error) from None
    require(device.type != "meta", "device", given, "one that holds numbers")
    return "cpu" if device.type == "cpu" else str(device)


def _device_refused(device: Any, error: Exception) -> InvalidParameter:
    full = isinstance(error, torch.OutOfMemoryError)
    hint = "the model does not fit there: give a smaller --dtype" if full else "device must be one that torch can use"
    return InvalidParameter(f"device is {device!r}: {first_line(error)}", hint=hint)


def _stated_configs(folder: Path) -> list[dict[str, Any]]:
    """What a folder's own files say, without the defaults that a class of transformers adds."""
    configs = [hub.read_config(folder)]
    path = folder / "generation_config.json"
    if path.is_file():
        with suppress(OSError, ValueError):  # transformers passes over a damaged one, too
            configs.append(parse_json(path.read_text(encoding="utf-8")))
    return [config for config in configs if isinstance(config, dict)]


def _kernel_refused(kernel: str, made: Target, odd: str | None, dtype: torch.dtype, device: str) -> InvalidParameter:
    """Why another kernel runs than the one that was asked for: the first cause, and what helps against it."""
    cause = "the C++ kernels could not be compiled, or FLASHDRAFT_NATIVE is 0"
    hint = "install a C++ compiler (g++ or clang++), or leave --kernel out"
    size = made.decoder.odd_size() if isinstance(made, LeanTarget) else None
    if odd is not None:
        cause = odd
        hint = f"ours run plain llama-shaped models ({', '.join(FAMILIES)}); leave --kernel out"
    elif device != "cpu":
        cause = f"the C++ kernels run on a CPU, not on {device}"
        hint = "leave --device out, or give --kernel torch or compiled"
    elif dtype != torch.float32:
        cause = f"its weights are {str(dtype).removeprefix('torch.')}, the C++ kernels take float32"
        hint = "add --dtype float32, or leave --kernel out"
    elif size is not None:
        cause = size
        hint = "the C++ kernels cannot take that size; leave --kernel out"
    got = f"kernel is {kernel!r}, but `{made.name}` runs by {made.kernel_name}: {cause}"
    return InvalidParameter(got, hint=hint)


def drafters(
    draft: str | Path, target: Target, name: str, block_size: Size = None, tree_nodes: Size = None, *, tokenizer: Any = None
) -> Callable[[], Drafter]:
    """What makes new drafters of the kind called `draft` for this target; see `load`. tokenizer: the target's, if it is known."""
    _check_sizes(block_size, tree_nodes)
    if draft == "auto":
        draft = hub.builtin_draft(name) or "autoregressive"
    first, *others = union_parts(str(draft))
    if others:
        rest = "+".join(others)
        require("autoregressive" not in (first, *others), "draft", draft, "two methods that both draft")
        options = [(block_size, None if part == "prompt_lookup" else tree_nodes) for part in (first, rest)]
        parts = zip((first, rest), options, strict=True)
        one, other = (drafters(part, target, name, *own, tokenizer=tokenizer) for part, own in parts)
        return lambda: Union(one(), other())
    if draft in ("autoregressive", "prompt_lookup"):
        require(tree_nodes is None, "tree_nodes", tree_nodes, "left out: a draft network makes trees")
    if draft == "prompt_lookup":
        return lambda: PromptLookup(block_size=block_size or 8)
    if draft == "autoregressive":
        require(block_size is None, "block_size", block_size, "left out: plain decoding drafts nothing")
        return Autoregressive
    return partial(_network(_name_of(draft), target, name, tokenizer), block_size=block_size, tree_nodes=tree_nodes)


def union_parts(draft: str, is_there: Callable[[str], bool] = os.path.exists) -> list[str]:
    """The drafters that + joins; a path that is there may have a + in its name."""
    before, *behind = draft.split("+")
    if not behind or not all(draft.split("+")):
        return [draft]

    parts = []
    pieces = [before, *behind]
    while pieces:
        lengths = range(len(pieces), 0, -1)
        whole = next((count for count in lengths if is_there("+".join(pieces[:count]))), 1)
        parts.append("+".join(pieces[:whole]))
        pieces = pieces[whole:]
    return parts


def _check_sizes(block_size: Size, tree_nodes: Size) -> None:
    if block_size is not None:
        check_option("block_size", block_size, int, Allowed(1, MOST_NODES))
    if tree_nodes is not None:
        check_option("tree_nodes", tree_nodes, int, Allowed(2, MOST_NODES))


def _network(draft: str, target: Target, target_name: str, tokenizer: Any) -> Callable[..., Drafter]:
    """The drafters of a folder or hub id, of whichever method it is; a method's name is the one shipped for the target."""
    draft = shipped(draft, target_name)
    files = hub.resolve(draft)
    config = hub.read_config(files) if isinstance(files, Path) else {}
    if is_draft(config):
        return open_network(draft).drafters(target)
    small, own, _ = load_target(draft, dtype="float32" if target.kernel_name != "transformers" else "auto")  # a causal LM
    check_tokenizers(tokenizer or own, own, target, small)
    return partial(DraftModelDrafter, small, vocab_size=target.vocab_size)
