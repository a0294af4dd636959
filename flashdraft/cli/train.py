"""The training commands, from `prompts` to `push`: thin functions over flashdraft.train."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from typer import Argument, Exit, Option

from flashdraft import hub
from flashdraft.bench.profile import profile_training
from flashdraft.bench.report import print_table
from flashdraft.bench.tasks import evaluation_texts, named, read_prompts
from flashdraft.cli.options import (
    DTYPE_HELP,
    TARGET_HELP,
    Folder,
    ModelOptions,
    Out,
    TargetOptions,
    refuse_given,
)
from flashdraft.diffusion.learned import METHOD as IMAGE_METHOD
from flashdraft.diffusion.learned import BlockDraftModel, is_image_draft
from flashdraft.engine import check
from flashdraft.errors import FlashDraftError, InvalidParameter
from flashdraft.files import say
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.match import check_target
from flashdraft.generate import Model
from flashdraft.loading import (
    DTYPES,
    MOST_NODES,
    NETWORKS,
    load,
    load_tokenizer,
    open_network,
)
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.methods.network import DraftNetwork
from flashdraft.models.heads import TRAINED_HEADS
from flashdraft.models.target import Target
from flashdraft.process import is_terminal
from flashdraft.train.answers import check_origin
from flashdraft.train.config import TrainConfig, check_run_folder, tell_of_other_target
from flashdraft.train.doctor import diagnose
from flashdraft.train.facts import named_target
from flashdraft.train.features import (
    Data,
    FeatureSet,
    OnlineFeatures,
    ShardWriter,
    check_features_folder,
    write_features,
)
from flashdraft.train.initialise import (
    HEAD_RANKS,
    PLAIN_COPY,
    Head,
    copied_from_target,
    draft_config,
    layers_read,
    left_behind,
    random_weights,
    taken_from,
)
from flashdraft.train.objectives import CommonTokens
from flashdraft.train.own_prompts import (
    Asking,
    LocalWriter,
    RemoteWriter,
    Writer,
    write_own_prompts,
)
from flashdraft.train.prompts import write_prompts
from flashdraft.train.regenerate import Later, Server, mixed
from flashdraft.train.regenerate import regenerate as answer_prompts
from flashdraft.types import (
    COUNTS,
    HIGHEST,
    SEEDS,
    Allowed,
    SamplingParams,
    Stats,
    check_option,
    check_options,
    option,
    require,
)

_NO_HEAD = "none"
_LAYOUTS = {"fill-in": False, "anchor-first": True}  # by name: whether the anchor's row predicts
SETS_HELP = ".jsonl and .json files, or hub data sets as name:split or name:config:split"
_MOST = 2**31 - 1
_STEPS = Allowed(0, _MOST)
Prompts = Annotated[Path, Argument(metavar="PROMPTS", help="file that `flashdraft prompts` wrote")]
Answers = Annotated[list[Path], Argument(help="files that `flashdraft regenerate` wrote")]


@dataclass(frozen=True)
class DraftOptions:
    """The draft network to train.

    None: the default of `draft_config`, or what the drafter of --init-from has.
    """

    method: str = option("dflash", "what is trained", choices=tuple(NETWORKS))
    init: str = option(
        "target",
        "first weights: target (copied from its last layers) or random",
        choices=("target", "random"),
    )
    init_from: str | None = option(
        None, "first weights from this drafter, of the same target or of another of its width"
    )
    num_layers: int | None = option(None, "draft layers; 3 without --init-from", least=1, most=1024)
    block_size: int | None = option(
        None,
        "the anchor and what is drafted at once; by default 4, eagle3 6, medusa 5, draft_model 2",
        least=2,
        most=MOST_NODES,
    )
    num_features: int | None = option(
        None,
        "target layers whose outputs the drafter reads; 5 without --init-from",
        least=1,
        most=1024,
    )
    mask_token_id: int | None = option(
        None,
        "an id that the target never reads or writes; known for built-in targets",
        least=0,
        most=HIGHEST,
    )
    head: str | None = option(
        None,
        "its sequential head: selector (DFlash 2, with its convolutions), markov (DSpark), swiglu "
        "(ours: no other engine reads it) or none; by default selector, with anchor-first blocks "
        "markov, or what --init-from has",
        choices=(*TRAINED_HEADS, _NO_HEAD),
    )
    head_rank: int | None = option(
        None, "its inner size; by default 64, selector and markov 256", least=1, most=1 << 16
    )
    layout: str | None = option(
        None,
        "row k of a block predicts the token at anchor + k (fill-in) or behind it (anchor-first); "
        "by default what a new head has, markov anchor-first, or else what --init-from has",
        choices=tuple(_LAYOUTS),
    )

    def __post_init__(self) -> None:
        check_options(self)

    def shape(self, target: Target) -> DraftConfig:
        """The network's config.

        Raises InvalidParameter for options that mean nothing beside each other.
        """
        if self.method != "dflash":
            fixed = ["num_features", "mask_token_id", "head", "head_rank", "layout"]
            if self.method != "draft_model":
                fixed.append("num_layers")
            refuse_given(self, f"{self.method} has no such thing", *fixed)
        if self.head == _NO_HEAD:
            refuse_given(self, "head is none", "head_rank")

        wanted: dict[str, int] = {}
        held_head: str | None = None
        anchor_first = False
        if self.init_from is not None:
            refuse_given(self, "--init-from has the first weights", "init")
            first = self._first(target).config
            held_head = first.sequential_head
            if self.head == _NO_HEAD and held_head is not None:
                got = f"head is none, but `{self.init_from}` has a {held_head} head"
                raise InvalidParameter(got, hint=f"start from a copy without it: {PLAIN_COPY}")
            anchor_first = first.anchor_first
            wanted["num_layers"] = first.num_hidden_layers
            wanted["block_size"] = first.block_size
            wanted["num_features"] = len(first.target_layer_ids)
            wanted["mask_token_id"] = first.mask_token_id
        for name in ("num_layers", "block_size", "num_features", "mask_token_id"):
            given = getattr(self, name)
            if given is not None:
                wanted[name] = given
        head = self._head(held_head)
        if head != held_head:
            anchor_first = head == "markov"
        if self.layout is not None:
            anchor_first = _LAYOUTS[self.layout]
        config = draft_config(target, method=self.method, **wanted)
        return replace(config, anchor_first=anchor_first)

    def new_head(self, network: DraftNetwork) -> Head | None:
        """The head to add; None where none is wanted, or where --init-from has brought it along."""
        held = network.config
        head = self._head(held.sequential_head)
        if head is None:
            return None
        is_held = head == held.sequential_head
        if is_held and self.head_rank in (None, held.head_rank):
            return None
        return head, self.head_rank or HEAD_RANKS[head]

    def _head(self, held: str | None) -> str | None:
        """The network's sequential head; held: that of --init-from."""
        if self.method != "dflash" or self.head == _NO_HEAD:
            return None
        if self.head is not None:
            return self.head
        if self.init_from is not None:
            return held
        return "markov" if self.layout == "anchor-first" else "selector"

    def _first(self, target: Target) -> DraftNetwork:
        """The drafter of --init-from."""
        found = open_network(str(self.init_from), target.name)
        if found.method != self.method:
            drafter = f"init_from is {self.init_from!r}, a drafter of {found.method}"
            hint = f"give --method {found.method}, or a drafter of {self.method}"
            raise InvalidParameter(f"{drafter}, but method is {self.method}", hint=hint)
        return found

    def network(self, config: DraftConfig, target: Target, data: Data, seed: int) -> DraftNetwork:
        """The network with its first weights.

        data: of the layers that the network will read; its first sample calibrates a copy of the
        target's layers.
        """
        if self.init_from is not None:
            first = self._first(target)
            if first.config.anchor_first != config.anchor_first:
                names = {is_first: name for name, is_first in _LAYOUTS.items()}
                there = f"the blocks of `{self.init_from}` are {names[first.config.anchor_first]}"
                here = f"those of this run {names[config.anchor_first]}"
                say(f"{there}, {here}: every row learns another position anew")
            for lost in left_behind(first, config, target):
                say(f"{lost} of `{self.init_from}`")
            return taken_from(config, first, seed)
        if self.init == "random":
            return random_weights(config, seed)
        return copied_from_target(config, target.name, data[0], seed)


@dataclass(frozen=True)
class SourceOptions:
    """Where training samples come from."""

    target: str = option("smollm2-135m", TARGET_HELP)
    dtype: str = option("auto", DTYPE_HELP, choices=DTYPES)
    online: bool = option(
        False, "FEATURES are answers: the target reads them at every use, and nothing is stored"
    )
    max_length: int = option(
        512,
        "with --online: tokens of prompt and answer that are read, at most",
        least=2,
        most=_MOST,
    )

    def __post_init__(self) -> None:
        check_options(self)

    def check(self, paths: list[Path]) -> None:
        """What of the source can be refused before the target is loaded."""
        facts = {"target": named_target(self.target)}
        if self.online:
            for path in paths:
                check_origin(path, facts, tell=False)
        elif len(paths) == 1:
            FeatureSet(paths[0]).check_target(facts, tell=False)

    def open(self, paths: list[Path], lm: Model, draft: DraftOptions, *, final: bool) -> Data:
        if self.online:
            layers = draft.shape(lm.target).target_layer_ids
            return OnlineFeatures(lm, paths, layers=layers, max_length=self.max_length, final=final)

        refuse_given(self, "the folder of features has its own without --online", "max_length")
        if len(paths) > 1:
            got = f"got {len(paths)} folders of features"
            raise InvalidParameter(got, hint="give all answers to one `flashdraft features`")
        return FeatureSet(paths[0])


def _check_mask(shape: DraftConfig, lm: Model) -> None:
    """A mask that ends texts would be read and written by the target itself."""
    if shape.method == "dflash" and shape.mask_token_id in lm.eos:
        got = f"mask_token_id is {shape.mask_token_id}, which ends the texts of `{lm.target.name}`"
        hint = "mask_token_id must be an id that the target never reads or writes"
        raise InvalidParameter(got, hint=hint, option="mask_token_id")


@dataclass(frozen=True)
class AskingOptions:
    """How many prompts the target writes itself, and how."""

    self_: int | None = option(
        None, "no data: so many prompts that the target writes itself", least=1, most=_MOST
    )

    turns: int = option(
        1, "with --self: questions of a talk, at most, each behind an answer", least=1, most=64
    )
    temperatures: str = option(
        "0.7,0.85,1", "with --self: of the questions, comma-separated, in turn"
    )
    max_question: int = option(128, "with --self: tokens of a question", least=1, most=_MOST)
    max_answer: int = option(
        512, "with --self: tokens of the answers within a talk", least=1, most=_MOST
    )
    system: str | None = option(
        None, "with --self: what the system turn says; by default as the chat template has it"
    )
    max_rows: int = option(8, "with --self: prompts written together, at most", least=1, most=_MOST)
    url: str | None = option(
        None, "with --self: an OpenAI-compatible server that writes, http://host:port/v1"
    )
    model: str | None = option(None, "with --self: the target's name on that server")

    def __post_init__(self) -> None:
        check_options(self)

    def asking(self, seed: int) -> Asking:
        return Asking(
            turns=self.turns,
            temperatures=self._temperatures(),
            max_question=self.max_question,
            max_answer=self.max_answer,
            system=self.system,
            seed=seed,
        )

    def _temperatures(self) -> tuple[float, ...]:
        numbers = []
        for part in self.temperatures.split(","):
            try:
                numbers.append(float(part))
            except ValueError:
                require(False, "temperatures", self.temperatures, "numbers, comma-separated")
        for number in numbers:
            check_option("temperatures", number, float, Allowed(0))
        return tuple(numbers)

    def writer(self, target: TargetOptions) -> Writer:
        """The target here, or its tokenizer alone before a server."""
        if self.url is None and self.model is None:
            return LocalWriter(target.load(max_rows=self.max_rows))
        if self.url is None or self.model is None:
            raise InvalidParameter("--url and --model go together", hint="give both, or neither")
        refuse_given(target, "--url writes", "dtype", "device", "kernel")
        server = Server(self.url, self.model, self.max_rows)
        return RemoteWriter(server, load_tokenizer(target.target), target.target)


def prompts(
    out: Out,
    asking: AskingOptions,
    target: TargetOptions,
    files: Annotated[list[str] | None, Argument(metavar="SETS", help=SETS_HELP)] = None,
    data: Annotated[
        Path | None,
        Option(
            help="folder of the known sets; if nothing is named, FLASHDRAFT_DATA; "
            "with --self: its evaluation sets, whose entries are dropped"
        ),
    ] = None,
    thinking: Annotated[
        float | None,
        Option(help="share of the prompts that ask the target to think, from 0 to 1"),
        Allowed(0, 1),
    ] = None,
    seed: Annotated[int, Option(help="seed of the order, or of the target's prompts"), SEEDS] = 0,
) -> None:
    """Training 1: prompts of any data sets, or the target's own.

    Examples:
        flashdraft prompts --self 5000 --target Qwen/Qwen3-0.6B --out prompts.jsonl
        flashdraft prompts chats.jsonl tatsu-lab/alpaca:train --out prompts.jsonl --thinking 0.5
    """
    if data is None and not files and "FLASHDRAFT_DATA" in os.environ:
        data = Path(os.environ["FLASHDRAFT_DATA"])
    if asking.self_ is not None:
        if files or thinking is not None:
            got = "--self takes no data sets and no --thinking"
            raise InvalidParameter(got, hint="write the two into files of their own")
        _own_prompts(out, asking.self_, data, asking.writer(target), asking.asking(seed))
        return

    refuse_given(asking, "the target writes nothing without --self")
    refuse_given(target, "the target writes nothing without --self")
    count = write_prompts(data, out, files=files or (), thinking=thinking, seed=seed)
    print(f"{count} prompts in {out}")


def _own_prompts(out: Path, count: int, data: Path | None, writer: Writer, asking: Asking) -> None:
    evaluation: list[str] = []
    if data is None:
        say("no evaluation sets at hand (--data, FLASHDRAFT_DATA): none is compared with")
    else:
        evaluation = list(evaluation_texts(data))
    quiet = not is_terminal(sys.stderr)
    dropped = write_own_prompts(writer, out, count, asking, evaluation=evaluation, quiet=quiet)
    reasons = [f"{number} {reason}" for reason, number in dropped.most_common()]
    told = ", ".join(reasons) or "none"
    print(f"{count} prompts in {out}; dropped: {told}")


@dataclass(frozen=True)
class FeatureOptions:
    """What is stored of every answer."""

    num_features: int = option(
        5, "target layers whose outputs are stored for dflash", least=1, most=1024
    )
    methods: str = option(
        "dflash", f"comma-separated: store what these read, of {', '.join(NETWORKS)}"
    )
    max_length: int = option(
        512, "tokens of prompt and answer that are stored, at most", least=2, most=_MOST
    )
    soft_labels: bool = option(False, "also the final state, of which soft labels are made")

    def __post_init__(self) -> None:
        check_options(self)

    def kind(self, lm: Model) -> dict[str, Any]:
        """As flashdraft.train.features takes it."""
        methods = self.methods.split(",")
        are_known = set(methods) <= NETWORKS.keys()
        require(are_known, "methods", self.methods, f"of {', '.join(NETWORKS)}")
        layers: set[int] = set()
        for method in methods:
            layers.update(layers_read(lm.target.num_layers, method, self.num_features))
        return {
            "layers": tuple(sorted(layers)),
            "max_length": self.max_length,
            "final": self.soft_labels,
        }


@dataclass(frozen=True)
class AnswerOptions:
    """Who answers how many prompts, how, and what is kept."""

    max_rows: int = option(8, "prompts answered together, at most", least=1, most=_MOST)
    limit: int | None = option(None, "only the file's first prompts", least=1, most=_MOST)
    greedy_share: float = option(
        0.0,
        "share of the prompts that are answered greedily at a temperature above 0",
        least=0,
        most=1,
    )
    url: str | None = option(
        None, "an OpenAI-compatible server that answers instead, http://host:port/v1"
    )
    model: str | None = option(None, "the target's name on that server")
    keep_features: str | None = option(
        None, "keep what the target saw in this folder, for `flashdraft features`"
    )

    def __post_init__(self) -> None:
        check_options(self)

    def server(self, *unused: ModelOptions | FeatureOptions) -> Server | None:
        """None without --url; the options of `unused` mean nothing to a server."""
        if self.url is None and self.model is None:
            return None
        if self.url is None or self.model is None:
            raise InvalidParameter("--url and --model go together", hint="give both, or neither")
        refuse_given(self, "--url answers", "keep_features")
        for group in unused:
            refuse_given(group, "--url answers")
        return Server(self.url, self.model, self.max_rows)


def regenerate(
    file: Prompts,
    out: Out,
    options: ModelOptions,
    params: SamplingParams,
    answer: AnswerOptions,
    stored: FeatureOptions,
) -> None:
    """Training 2: the target's own answers; run again to resume.

    Examples:
        flashdraft regenerate prompts.jsonl --out answers.jsonl --max-rows 32
        flashdraft regenerate p.jsonl --out answers.jsonl --url http://host:8000/v1 --model qwen3-8b
    """
    law = mixed(params, answer.greedy_share)
    folder = None if answer.keep_features is None else Path(answer.keep_features)
    if folder is None and answer.url is None:
        refuse_given(stored, "nothing is kept without --keep-features")
    if folder is not None:
        check_features_folder(folder, options.target)

    def load_all() -> tuple[Model, ShardWriter | None]:
        lm = options.load(max_rows=answer.max_rows)
        writer = None if folder is None else ShardWriter(lm, folder, **stored.kind(lm))
        return lm, writer

    source = answer.server(options, stored) or Later(options.target, load_all)
    quiet = not is_terminal(sys.stdout)
    count = answer_prompts(source, file, out, params=law, limit=answer.limit, quiet=quiet)
    print(f"{count} new answers in {out}")


def features(answers: Answers, out: Folder, model: TargetOptions, stored: FeatureOptions) -> None:
    """Training 3: the target's hidden states; run again to resume.

    Examples:
        flashdraft features answers.jsonl --out features
        flashdraft features a.jsonl b.jsonl --out features --max-length 1024
    """
    check_features_folder(out, model.target, inputs=answers)
    lm = model.load()
    quiet = not is_terminal(sys.stdout)
    count = write_features(lm, answers, out, **stored.kind(lm), quiet=quiet)
    print(f"{count} shards in {out}")


def train(
    source: Annotated[
        list[Path],
        Argument(
            metavar="FEATURES", help="what `flashdraft features` wrote; with --online, answers"
        ),
    ],
    out: Folder,
    eval_prompts: Annotated[Path, Option(help="held-out prompts, on which tau is measured")],
    draft: DraftOptions,
    config: TrainConfig,
    where: SourceOptions,
    profile: Annotated[
        int, Option(help="only measure this many steps, and show where their time goes"), _STEPS
    ] = 0,
) -> None:
    """Training 4: a drafter; run again to resume.

    Examples:
        flashdraft train features --out run --eval-prompts held_out.jsonl
        flashdraft train features --out run2 --eval-prompts held_out.jsonl --init-from run/best
    """
    check_run_folder(out, inputs=source)
    held_out = [prompt.asked for prompt in read_prompts(eval_prompts)]
    where.check(source)
    try:
        from flashdraft.train.trainer import Trainer, process_device
    except ModuleNotFoundError as error:
        got = f"training needs the package {error.name}"
        raise FlashDraftError(got, hint='pip install "flashdraft[train]"') from None

    device = str(process_device())
    lm = load(where.target, draft="autoregressive", dtype=where.dtype, device=device)
    needs_final_state = config.kl + config.tv > 0
    data = where.open(source, lm, draft, final=needs_final_state)
    shape = draft.shape(lm.target)
    check_target(shape, lm.target)
    _check_mask(shape, lm)
    data.only(shape.target_layer_ids)
    network = draft.network(shape, lm.target, data, config.seed)
    trainer = Trainer(network, lm, data, out, config, head=draft.new_head(network))
    if profile:
        print_table(["part", "ms a step", "share"], profile_training(trainer, profile))
        return

    is_first = trainer.acc.is_main_process
    if trainer.common is not None and is_first:
        _print_coverage(trainer.common)
    best = trainer.run(held_out, quiet=not is_terminal(sys.stdout))
    if is_first:
        print(f"best tau {best:.3f}; the drafter: {out / 'best'}")


def _print_coverage(common: CommonTokens) -> None:
    """How much of the answers can be drafted, of each file where there are several."""
    print(f"the draft vocabulary covers {common.covered:.2%} of the answers' tokens")
    if len(common.covered_by_file) > 1:
        for file, share in common.covered_by_file.items():
            print(f"  {share:.2%} of {file or 'files without a note'}")


def eval(
    file: Annotated[
        Path,
        Argument(metavar="PROMPTS", help="held-out prompts: objects with a `prompt`, one a line"),
    ],
    model: ModelOptions,
    max_new_tokens: Annotated[int, Option(help="tokens an answer, at most"), COUNTS] = 256,
    max_rows: Annotated[int, Option(help="prompts decoded together, at most"), COUNTS] = 8,
) -> None:
    """Training 5: the real accepted length on held-out prompts.

    Examples:
        flashdraft eval held_out.jsonl --draft run/best
        flashdraft eval held_out.jsonl --target Qwen/Qwen3-8B --draft org/drafter
    """
    tell_of_other_target(model.draft, named_target(model.target))
    loaded = model.load(max_rows=max_rows)
    lm = replace(loaded, adaptive=False)  # the drafter is judged by whole blocks
    params = SamplingParams(max_new_tokens=max_new_tokens)
    asked = []
    for prompt in read_prompts(file):
        with named(prompt.place):
            check(lm.target, lm.request(prompt.asked, params))
        asked.append(prompt.asked)

    stats: list[Stats] = [result.stats for result in lm.generate(asked, params)]
    lengths: list[int] = []
    for one in stats:
        lengths += one.accepted_lengths
    tau = fmean(one.tau for one in stats)
    print(f"tau {tau:.3f} on {len(stats)} prompts, {len(lengths)} target passes")

    cells = []
    for position in range(1, max(lengths, default=1)):
        share = fmean(length > position for length in lengths)
        cells.append([str(position), f"{share:.1%}"])
    if cells:
        print_table(["draft position", "accepted"], cells)


def doctor(
    draft: Annotated[str, Argument(help="the drafter's folder or hub id")],
    target: Annotated[str, Argument(help=TARGET_HELP)],
    data: Annotated[Path, Argument(help="folder that `flashdraft features` wrote")],
    num_samples: Annotated[int, Option(help="samples that are looked at"), COUNTS] = 8,
) -> None:
    """Find out why a drafter is accepted too little.

    Examples:
        flashdraft doctor run/best smollm2-135m features
        flashdraft doctor org/drafter Qwen/Qwen3-8B features --num-samples 32
    """
    tell_of_other_target(draft, named_target(target))
    lm = load(target, draft="autoregressive")
    network = open_network(draft, target)
    if not isinstance(network, DFlashDraftModel):
        got = f"the doctor knows drafters of dflash; `{draft}` is of {network.method}"
        measure = f"flashdraft eval PROMPTS --draft {draft}"
        raise InvalidParameter(got, hint=f"`{measure}` measures how much of it is accepted")

    passed = True
    for finding in diagnose(network, lm, FeatureSet(data), num_samples=num_samples):
        word = "ok  " if finding.passed else "FAIL"
        print(f"{word} {finding.test}: {finding.text}")
        if not finding.passed:
            passed = False
            print(f"     hint: {finding.hint}")
    if not passed:
        raise Exit(1)


def push(
    folder: Annotated[Path, Argument(help="a drafter's folder")],
    repo: Annotated[str, Argument(help="the model repository on the hub, owner/name")],
    private: Annotated[bool, Option("--private", help="make a private one")] = False,
) -> None:
    """Upload a drafter's folder to the hub, or an image draft's.

    Examples:
        flashdraft push run/best my-name/my-drafter
        flashdraft push run/best my-name/my-drafter --private
    """
    # Whole, or they say what is wrong.
    if is_image_draft(folder):
        BlockDraftModel.from_pretrained(folder)
        what = IMAGE_METHOD
    else:
        what = open_network(folder).method
    print(hub.push(folder, repo, what=what, private=private))
