"""Attention of one query per row and head over listed slots of a key-value cache, which is not copied.

    q       [B, H, d]      queries, any strides; H is a multiple of Hk, and query head h reads key head h // (H / Hk)
    k, v    [B, Hk, S, d]  the cache, any strides, same dtype
    index   [B, Hk, K] int32 or int64, slots that a key head reads, in any order; -1 for none, others 0 <= index < S
    scale   factor on q . k before the softmax
    result  [B, H, d] contiguous, dtype of q; zeros where a list names no slot

Bytes moved, e bytes per element: 2 e * B * Hk * K * d of the cache, 8 * B * Hk * K of index, and little else: every
list is cut in pieces that keep a device busy, whose partial results (4 * (d + 1) per query head and piece) are joined.
The definition gathers first, so it writes and reads the listed slots once more.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vtoken.kernels._dispatch import heads_fit, interpretable, tl, triton
from vtoken.kernels._examples import Example, Examples, apart, within
from vtoken.kernels._tiles import LOG2_E
from vtoken.kernels.gather_cache import definition as gathered

TILE = 64  # slots that a program reads at once
PROGRAMS = 512  # as many keep a device busy
tolerance = within((1e-5, 1e-5), half=(2e-2, 1e-2))


def definition(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> Tensor:
    """torch's attention over the gathered slots."""
    keys, values = gathered((k, v), index.clamp(min=0))
    real = (index >= 0)[:, :, None]
    queries = q.unflatten(1, (k.shape[1], -1))
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=real, scale=scale)
    return torch.where(real.any(-1, keepdim=True), out, 0).flatten(1, 2)


@triton.jit(do_not_specialize=["kept", "span"])
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, index, out, sums, heads, kept, span, d, scale, q_strides, k_strides, v_strides,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Program (piece of a list, batch row and key head): attention over the piece, [B Hk, pieces, GROUPS, d], and
    log2 of its denominators."""
    pair = tl.program_id(1).to(tl.int64)
    row = pair // heads
    head = pair % heads
    query = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    wide = dim < d
    address = row * q_strides[0] + (head * GROUPS + query)[:, None] * q_strides[1] + dim[None, :] * q_strides[2]
    asked = tl.load(q + address, mask=(query < GROUPS)[:, None] & wide[None, :], other=0.0)
    k_start = k + row * k_strides[0] + head * k_strides[1]
    v_start = v + row * v_strides[0] + head * v_strides[1]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, DIM], tl.float32)
    first = tl.program_id(0) * span
    for start in range(first, tl.minimum(first + span, kept), TILE):
        at = start + tl.arange(0, TILE)
        slot = tl.load(index + pair * kept + at, mask=at < kept, other=-1).to(tl.int64)
        real = slot >= 0
        address = slot[None, :] * k_strides[2] + dim[:, None] * k_strides[3]
        columns = tl.load(k_start + address, mask=real[None, :] & wide[:, None], other=0.0)
        scores = tl.dot(asked, columns, input_precision="ieee") * scale
        scores = tl.where(real[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        address = slot[:, None] * v_strides[2] + dim[None, :] * v_strides[3]
        values = tl.load(v_start + address, mask=real[:, None] & wide[None, :], other=0.0)
        found = found * fade[:, None] + tl.dot(share.to(values.dtype), values, input_precision="ieee")
        total = total * fade + tl.sum(share, 1)
        top = higher
    piece = (pair * tl.num_programs(0) + tl.program_id(0)) * GROUPS + query
    found = found / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + piece[:, None] * d + dim[None, :], found, mask=(query < GROUPS)[:, None] & wide[None, :])
    tl.store(sums + piece, top + tl.log2(total), mask=query < GROUPS)


def launch(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> Tensor:
    """Launches the kernel: the contract of the definition without gradients, for dtypes in DTYPES and d up to 256."""
    dtype = q.dtype
    q, k, v = (interpretable(x.detach()) for x in (q, k, v))
    (batch, heads, d), key_heads, kept = q.shape, k.shape[1], index.shape[2]
    groups, pairs = heads // key_heads, batch * key_heads
    pieces = max(1, min(-(-kept // TILE), PROGRAMS // max(1, pairs)))
    span = -(-kept // (pieces * TILE)) * TILE
    out = torch.empty((pairs, pieces, groups, d), dtype=torch.float32, device=q.device)
    sums = torch.empty((pairs, pieces, groups), dtype=torch.float32, device=q.device)
    if out.numel():
        with torch.cuda.device_of(q):  # triton launches on the current device
            _attend[(pieces, pairs)](
                q, k, v, index.contiguous(), out, sums, key_heads, kept, span, d, scale * LOG2_E,
                q.stride(), k.stride(), v.stride(),
                GROUPS=groups, ROWS=max(16, triton.next_power_of_2(groups)), TILE=TILE,
                DIM=max(16, triton.next_power_of_2(d)),
            )  # fmt: skip
    shares = torch.exp2(sums - sums.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).min))
    joined = (out * shares[..., None]).sum(1) / shares.sum(1).clamp(min=1e-30)[..., None]
    return joined.view(batch, heads, d).to(dtype)


def attend_slots(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> Tensor:
    """Attention over listed slots, see the top of the file. Differentiable.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: a slot is out of range, on the CPU; on a device the result is then undefined.
    """
    rows_and_width = q.ndim == 3 and (len(q), q.shape[2]) == (len(k), k.shape[3])
    if not rows_and_width or k.shape != v.shape or q.shape[1] % k.shape[1] or index.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, index {tuple(index.shape)}: need [B, H, d], "
            "[B, Hk, S, d] twice and [B, Hk, K], H a multiple of Hk"
        )
    return (launch if heads_fit(q, k, v, beside=[index]) else definition)(q, k, v, index, scale)


def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)

    def case(batch: int, heads: tuple[int, int], slots: int, kept: int, d: int) -> Example:
        q = torch.randn(batch, heads[0], d, generator=generator)
        k, v = (torch.randn(batch, heads[1], slots, d, generator=generator) for _ in range(2))
        index = torch.randint(-1, slots, (batch, heads[1], kept), generator=generator)
        return {"q": q, "k": k, "v": v, "index": index, "scale": d**-0.5}

    yield case(1, (1, 1), 1, 0, 8)
    yield case(1, (2, 1), 5, 3, 20)
    yield case(2, (14, 2), 70, 65, 64)
    yield case(1, (4, 4), 300, 257, 128)
    empty = case(2, (6, 2), 33, 9, 72)
    empty["index"][1, 0] = -1
    yield {**empty, "index": empty["index"].int(), "scale": 2.0}
    strided = case(2, (3, 3), 40, 17, 256)
    yield {**strided, **{name: apart(strided[name], 1, 2) for name in "kv"}}
