"""What draft networks and the lean target are made of: packed linears, RMSNorm, rotary positions, attention to slots.

Knows tensors and weights. Does not know models, caches' owners, or which tokens are drafts.

Row-exact: a row's result does not depend on how many rows travel with it. That is what makes the text of a chain
equal to plain text bit for bit, ties included. A linear finds out at load whether it is; attention gets it by always running the
same small shapes: `CHUNK` queries against a number of slots that depends on the query's own position alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft import native
from flashdraft.cache import round_up

__all__ = ["CHUNK", "Linear", "PackedLinear", "RMSNorm", "SlotAttention", "apply_rotary", "pack", "rotary_table"]

CHUNK = 4  # queries of one row that share an attention call
_PACK_HINT = 16  # the batch size that oneDNN packs weights for; below 8 its rows are not exact


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, over the last dimension, in the weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class PackedLinear:
    """x -> x @ weight.T + bias with the weight packed once for few rows (oneDNN, float32 on a CPU; else F.linear).

    `row_exact` is measured on this machine: with one row padded to `min_rows`, every row's bits are the same whatever
    the number of rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.numel() * weight.element_size()
        self.bias = bias
        has_linear = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        self.packed = weight.dtype == torch.float32 and weight.device.type == "cpu" and has_linear
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_HINT) if self.packed else weight
        self.format = "oneDNN" if self.packed else "torch"
        self.min_rows, self.row_exact = self._measure(weight) if self.packed else (1, False)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]"""
        if x.shape[0] >= self.min_rows:
            return self._run(x)
        return self._run(F.pad(x, (0, 0, 0, self.min_rows - x.shape[0])))[: x.shape[0]]

    def _run(self, x: Tensor) -> Tensor:
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
            return out
        return F.linear(x, self.weight, self.bias)

    def _measure(self, weight: Tensor) -> tuple[int, bool]:
        """The fewest rows from which on rows agree bit for bit, probed with real weights."""
        x = torch.randn(33, self.in_features, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
        whole = self._run(x)
        exact = {n: torch.equal(self._run(x[:n].contiguous()), whole[:n]) for n in (1, 2, 3, 4, 5, 8, 12, 16, 24, 32)}
        for least in (1, 2, 4):
            if all(same for n, same in exact.items() if n >= least):
                return least, True
        return 1, False


Linear = PackedLinear | native.NativeLinear


def pack(weight: Tensor, bias: Tensor | None = None, *, kernel: str = "compact") -> Linear:
    """A native linear where one can be had (`kernel`: decoder.KERNELS), else oneDNN's or torch's."""
    if native.usable(weight) and weight.shape[1] % native.PANEL == 0:
        return native.NativeLinear(weight, bias, format=native.format_of(weight, kernel))
    return PackedLinear(weight, bias)


def rotary_table(inv_freq: Tensor, num_positions: int, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `apply_rotary` takes, for every position: cos and signed sin, [positions, head_dim] each."""
    angles = torch.outer(torch.arange(num_positions, device=inv_freq.device, dtype=torch.float32), inv_freq.float())
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [..., heads, head_dim]; cos, sin: [..., 1, head_dim] of `rotary_table` (RoFormer 2104.09864, half-split layout)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin


class SlotAttention:
    """Attention of one row's new nodes to its slots, planned once per step and run by every layer.

    length: slots committed before this step; visible: bool [n, n], which new nodes each new node sees, or None for a
    chain; window: how many slots back a node at its own slot sees, itself included, or None for all.
    """

    def __init__(
        self, length: int, num_nodes: int, *, visible: Tensor | None, groups: int, like: Tensor, window: int | None = None
    ) -> None:
        self.num_nodes, self.window = num_nodes, window
        self.groups = groups  # query heads per key head
        self.calls: list[tuple[int, int, int, Tensor]] = []  # first node, last node, slots read, mask
        first = 0
        while first < num_nodes:
            reads = round_up(length + (first + 1 if visible is None else num_nodes))
            last = min(first + CHUNK, num_nodes, reads - length if visible is None else num_nodes)
            self.calls.append((first, last, reads, self._mask(length, first, last, reads, visible, like)))
            first = last

    def _mask(self, length: int, first: int, last: int, reads: int, visible: Tensor | None, like: Tensor) -> Tensor:
        """[1, 1, CHUNK * groups, reads]"""
        nodes = torch.arange(first, first + CHUNK, device=like.device).clamp(max=last - 1)
        slots = torch.arange(reads, device=like.device)
        if visible is None:
            seen = slots <= length + nodes[:, None]
        else:
            new = F.pad(visible[nodes], (length, max(reads - length - self.num_nodes, 0)))[:, :reads]
            seen = (slots < length) | new
        if self.window is not None:
            seen &= slots > length + nodes[:, None] - self.window
        bias = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))
        return bias.repeat(self.groups, 1)[None, None]

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """query: [n, heads, head_dim]; keys, values: [kv_heads, slots, head_dim] -> [n, heads * head_dim].

        Rows of `query` behind the plan's nodes are padding; they come back as something.
        """
        outputs = []
        kv_heads, heads, head_dim = keys.shape[0], query.shape[1], query.shape[2]
        for first, last, reads, mask in self.calls:
            part = query[first : first + CHUNK]
            if len(part) < CHUNK:
                part = F.pad(part, (0, 0, 0, 0, 0, CHUNK - len(part)))
            folded = part.transpose(0, 1).reshape(1, kv_heads, -1, head_dim)  # query heads of one key head side by side
            kv = keys[:, :reads][None], values[:, :reads][None]
            out = F.scaled_dot_product_attention(folded, *kv, attn_mask=mask, scale=scale)
            out = out.view(heads, CHUNK, head_dim).transpose(0, 1).reshape(CHUNK, -1)
            outputs.append(out[: (last if last < self.num_nodes else len(query)) - first])
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
