"""The lossless rule: which part of a proposal the target accepts.

Knows laws, parents and uniforms. Does not know models, caches, tokenizers, or which method drafted.
Speculative sampling over a tree (Leviathan 2211.17192, section 2.3; Miao 2305.09781, section 4.3): a chain is a tree with
one child per node, greedy is temperature 0, a deterministic draft is a point mass.
"""

import torch
from torch import Tensor

from flashdraft.decoding.sampling import draw, total
from flashdraft.process import INTS
from flashdraft.types import Proposal, Verdict

__all__ = ["follow", "verify"]


def verify(
    proposal: Proposal, target_probs: Tensor, draws: Tensor, coins: Tensor | None = None
) -> Verdict:
    """Walk each row's tree from its anchor and keep what the target itself could have written.

    target_probs: [rows, nodes, vocab]; row r, node i holds the target's law after node i. Padding is never read.
    draws: [rows, 1 + depth or more] float64; column d draws the token that follows d accepted nodes, keyed by its position.
    coins: [rows, nodes] float64; a fresh uniform for every drawn node (`sampling.coins`); needed only if one is drawn.
    Returns the accepted path of every row and the bonus token after it.

    At a node the drawn children are judged first, in node order. If none is accepted, the target draws its own token from
    what they left of its law: a chosen child that carries it is accepted, otherwise the token is the bonus.
    The text has the target's law exactly, whatever the draft was, if the drafter kept its side: drawn siblings come from
    `probs` of their parent without replacement, never equal a chosen sibling, and are dropped last ones first, for reasons
    fixed before their own tokens were drawn. Where all nodes are chosen, the text is the very text that `draws` alone give.
    """
    num_rows, num_nodes = proposal.tokens.shape
    nodes = torch.arange(num_nodes, dtype=torch.int64, device=proposal.tokens.device)
    parents = proposal.parents.masked_fill(
        nodes >= proposal.sizes[:, None], -1
    )  # padding is nobody's child
    drawn = (
        proposal.drawn
        if proposal.drawn is not None
        else torch.zeros_like(parents, dtype=torch.bool)
    )
    any_drawn = bool((drawn & (parents >= 0)).any())

    # the rows still walking, and the node where each of them stands
    rows = torch.arange(num_rows, dtype=torch.int64, device=nodes.device)
    here = torch.zeros_like(rows)
    bonus = torch.zeros_like(rows)
    path = [here]
    while len(rows):
        law = target_probs[rows, here]
        children = parents[rows] == here[:, None]
        accepted = torch.full_like(rows, -1)
        if any_drawn:
            assert proposal.probs is not None, "drawn nodes without the law they were drawn from"
            assert coins is not None, "drawn nodes without coins"
            accepted, law = _judge(
                law,
                proposal.probs[rows, here],
                children & drawn[rows],
                proposal.tokens[rows],
                coins[rows],
            )
        token = draw(law, draws[rows, len(path) - 1])
        carries = children & ~drawn[rows] & (proposal.tokens[rows] == token[:, None])
        child = torch.where((accepted < 0) & carries.any(1), carries.long().argmax(1), accepted)
        bonus[rows] = token  # a row that goes on will write a later one
        rows, here = rows[child >= 0], child[child >= 0]
        path.append(torch.full_like(bonus, -1).index_put((rows,), here))
    full = torch.stack(path[:-1], 1)  # the last column is empty: every row ended there
    return Verdict(path=full, num_accepted=(full >= 0).sum(1) - 1, bonus=bonus)


def follow(proposal: Proposal, tokens: Tensor) -> Verdict:
    """`verify` where every node is chosen and every law is a point mass, at tokens [rows, nodes]."""
    paths, bonus = [], []
    lists = (t.tolist() for t in (proposal.tokens, proposal.parents, proposal.sizes, tokens))
    for drafted, parents, size, own in zip(*lists, strict=True):
        children = {(parents[node], drafted[node]): node for node in range(1, size)}
        path = [0]
        while (child := children.get((path[-1], own[path[-1]]))) is not None:
            path.append(child)
        paths.append(path)
        bonus.append(own[path[-1]])
    full = torch.tensor(
        [path + [-1] * (max(map(len, paths)) - len(path)) for path in paths], **INTS
    )
    counts = torch.tensor([len(path) - 1 for path in paths], **INTS)
    return Verdict(full, counts, torch.tensor(bonus, **INTS))


def _judge(
    law: Tensor, draft: Tensor, siblings: Tensor, tokens: Tensor, coins: Tensor
) -> tuple[Tensor, Tensor]:
    """Judge drawn siblings in node order, each with probability min(1, p / q); a rejected one leaves the rest of p and of q.

    law, draft: [rows, vocab], p and q of one node a row, overwritten; siblings, tokens, coins: [rows, nodes].
    Returns the accepted node (-1: none) and the law of the token if none was accepted.
    """
    accepted = torch.full_like(tokens[:, 0], -1)
    for node in siblings.any(0).nonzero()[:, 0].tolist():
        rows = (siblings[:, node] & (accepted < 0)).nonzero()[:, 0]
        p, q, token = law[rows], draft[rows], tokens[rows, node, None]
        passes = coins[rows, node] * q.gather(1, token)[:, 0] < p.gather(1, token)[:, 0]
        accepted[rows[passes]] = node
        rows, p, q, token = rows[~passes], p[~passes], q[~passes], token[~passes]
        law[rows] = _normalized((p - q).clamp(min=0), otherwise=p)
        draft[rows] = _without(q, token)
    return accepted, law


def _without(q: Tensor, token: Tensor) -> Tensor:
    """The law of the next sibling, drawn without replacement: q given that it is not `token`. token: [rows, 1]."""
    return _normalized(q.scatter(1, token, 0.0), otherwise=q)


def _normalized(weights: Tensor, otherwise: Tensor) -> Tensor:
    """Weights over their mass; `otherwise` where rounding left no mass at all."""
    mass = total(weights)
    return torch.where(mass > 0, weights / mass, otherwise)
