"""What one call of a pipe took."""

from dataclasses import dataclass, field

from flashdraft.diffusion.sampler import Decision

__all__ = ["Stats"]


@dataclass
class Stats:
    """What one call of the pipe took.

    steps: of the sampler; rounds: calls of the target, one after the other; rows: that it read in
    them, both branches of guidance counted. accepted_by_lag: (drafted, accepted) by steps since a
    block's first point. predicted: mean chance that a drafted step would stand. defects: by image,
    of tolerance mode. voids: blocks that a callback has changed. measuring: seconds in which the
    target's costs were measured, in the first loop that asks for them; `seconds` are the others.
    checked_rows: read beside the rounds, once for a UNet as it is set, to see that it reads rows
    one by one.
    """

    exact: bool
    steps: int = 0
    rounds: int = 0
    rows: int = 0
    images: int = 0
    accepted_by_lag: dict[int, tuple[int, int]] = field(default_factory=dict)
    predicted: float = 0.0
    defects: list[float] = field(default_factory=list)
    voids: int = 0
    seconds: float = 0.0
    measuring: float = 0.0
    checked_rows: int = 0
    decisions: list[Decision] = field(default_factory=list, repr=False)

    @property
    def drafted(self) -> int:
        return sum(drafted for drafted, _ in self.accepted_by_lag.values())

    @property
    def accepted(self) -> int:
        return sum(accepted for _, accepted in self.accepted_by_lag.values())

    def count(self, decisions: list[Decision]) -> None:
        """Drafted steps that were judged."""
        for one in decisions:
            drafted, accepted = self.accepted_by_lag.get(one.lag, (0, 0))
            self.accepted_by_lag[one.lag] = drafted + 1, accepted + one.stood
            before = len(self.decisions)
            self.predicted = (self.predicted * before + one.predicted) / (before + 1)
            self.decisions.append(one)

    def __str__(self) -> str:
        """One line for a terminal."""
        kind = "exact" if self.exact else "tolerance"
        told = f"{kind}: {self.steps} steps, {self.rounds} rounds, {self.rows} rows"
        if self.drafted:
            told += f", {self.accepted} of {self.drafted} drafted steps stood"
        if self.defects and not self.exact:
            told += f", defect {max(self.defects):.3f}"
        if self.seconds:  # nothing, where the pipe itself was called
            told += f", {self.seconds:.2f} s"
        if self.measuring:
            told += f"; {self.measuring:.2f} s more for measuring the target's costs, once"
        return told
