"""The lossless rule: which part of a proposal the target accepts.

Knows laws, parents and uniforms. Does not know models, caches, tokenizers, or which method drafted.
Speculative sampling over a tree (Leviathan 2211.17192, section 2.3; Miao 2305.09781, section 4.3):
a chain is a tree with one child per node, greedy is temperature 0, a deterministic draft is a point
mass.
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

    target_probs: [rows, nodes, vocab]; row r, node i holds the target's law after node i. Padding
        is never read.
    draws: [rows, 1 + depth or more] float64; column d draws the token that follows d accepted
        nodes, keyed by its position.
    coins: [rows, nodes] float64; a fresh uniform for every drawn node (`sampling.coins`); needed
        only if one is drawn.
    Returns the accepted path of every row and the bonus token after it.

    At a node the drawn children are judged first, in node order. If none is accepted, the target
    draws its own token from what they left of its law: a chosen child that carries it is accepted,
    otherwise the token is the bonus.

    The text has the target's law exactly, whatever the draft was, if the drafter kept its side:
    drawn siblings come from `probs` of their parent without replacement, never equal a chosen
    sibling, and are dropped last ones first, for reasons fixed before their own tokens were drawn.
    Where all nodes are chosen, the text is the very text that `draws` alone give.
    """
    tokens = proposal.tokens
    num_rows, num_nodes = tokens.shape
    nodes = torch.arange(num_nodes, dtype=torch.int64, device=tokens.device)
    is_padding = nodes >= proposal.sizes[:, None]
    parents = proposal.parents.masked_fill(is_padding, -1)  # padding is nobody's child
    drawn = proposal.drawn
    if drawn is None:
        drawn = torch.zeros_like(parents, dtype=torch.bool)
    any_drawn = bool((drawn & (parents >= 0)).any())

    # the rows still walking, and the node where each of them stands
    rows = torch.arange(num_rows, dtype=torch.int64, device=nodes.device)
    here = torch.zeros_like(rows)
    bonus = torch.zeros_like(rows)
    path = [here]
    while len(rows):
        law = target_probs[rows, here]
        children = parents[rows] == here[:, None]
        is_drawn = drawn[rows]
        accepted = torch.full_like(rows, -1)
        if any_drawn:
            assert proposal.probs is not None, "drawn nodes without the law they were drawn from"
            assert coins is not None, "drawn nodes without coins"
            draft = proposal.probs[rows, here]
            accepted, law = _judge(law, draft, children & is_drawn, tokens[rows], coins[rows])

        num_accepted = len(path) - 1
        token = draw(law, draws[rows, num_accepted])
        carries = children & ~is_drawn & (tokens[rows] == token[:, None])
        descends = (accepted < 0) & carries.any(1)
        child = torch.where(descends, carries.long().argmax(1), accepted)
        bonus[rows] = token  # a row that goes on will write a later one

        goes_on = child >= 0
        rows = rows[goes_on]
        here = child[goes_on]
        column = torch.full_like(bonus, -1)
        column[rows] = here
        path.append(column)

    full = torch.stack(path[:-1], 1)  # the last column is empty: every row ended there
    return Verdict(path=full, num_accepted=(full >= 0).sum(1) - 1, bonus=bonus)


def follow(proposal: Proposal, tokens: Tensor) -> Verdict:
    """`verify` where every node is chosen and every law is a point mass.

    tokens: [rows, nodes]; the one token that the target's law allows after each node.
    """
    paths = []
    bonus = []
    rows = zip(
        proposal.tokens.tolist(),
        proposal.parents.tolist(),
        proposal.sizes.tolist(),
        tokens.tolist(),
        strict=True,
    )
    for drafted, parents, size, own in rows:
        children = {(parents[node], drafted[node]): node for node in range(1, size)}
        node: int | None = 0
        path = []
        while node is not None:
            path.append(node)
            token = own[node]
            node = children.get((node, token))
        paths.append(path)
        bonus.append(token)

    longest = max(len(path) for path in paths)
    padded = [path + [-1] * (longest - len(path)) for path in paths]
    counts = [len(path) - 1 for path in paths]
    return Verdict(
        path=torch.tensor(padded, **INTS),
        num_accepted=torch.tensor(counts, **INTS),
        bonus=torch.tensor(bonus, **INTS),
    )


def _judge(
    law: Tensor, draft: Tensor, siblings: Tensor, tokens: Tensor, coins: Tensor
) -> tuple[Tensor, Tensor]:
    """Judge drawn siblings in node order, each accepted with probability min(1, p / q).

    A rejected one leaves max(0, p - q) of p, and q without its token, for those that follow.

    law, draft: [rows, vocab], p and q of one node a row, overwritten.
    siblings, tokens, coins: [rows, nodes].
    Returns the accepted node (-1: none) and the law of the token if none was accepted.
    """
    accepted = torch.full_like(tokens[:, 0], -1)
    judged = siblings.any(0).nonzero()[:, 0].tolist()
    for node in judged:
        rows = (siblings[:, node] & (accepted < 0)).nonzero()[:, 0]
        p = law[rows]
        q = draft[rows]
        token = tokens[rows, node, None]
        p_token = p.gather(1, token)[:, 0]
        q_token = q.gather(1, token)[:, 0]
        passes = coins[rows, node] * q_token < p_token
        accepted[rows[passes]] = node

        fails = ~passes
        p = p[fails]
        q = q[fails]
        law[rows[fails]] = _normalized((p - q).clamp(min=0), otherwise=p)
        draft[rows[fails]] = _without(q, token[fails])
    return accepted, law


def _without(q: Tensor, token: Tensor) -> Tensor:
    """The law of the next sibling, drawn without replacement: q given that it is not `token`.

    token: [rows, 1].
    """
    return _normalized(q.scatter(1, token, 0.0), otherwise=q)


def _normalized(weights: Tensor, otherwise: Tensor) -> Tensor:
    """Weights over their mass; `otherwise` where rounding left no mass at all."""
    mass = total(weights)
    return torch.where(mass > 0, weights / mass, otherwise)
