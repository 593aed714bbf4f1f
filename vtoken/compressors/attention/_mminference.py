"""Patterns of MMInference: where images and frames are, vertical-slash indices, and the grid that frames form."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtoken.compressors._rows import last_rows
from vtoken.compressors.attention._blocks import best, per_head
from vtoken.compressors.attention._singles import listed
from vtoken.kernels import probe_sums
from vtoken.stages import uploaded
from vtoken.stages.attention import PrefillQK

SIZE = 64  # tokens of a block, and how many last queries an index is built from
FIRST, NEAR = 30, 100  # first keys, and shortest distances, that every vertical-slash index includes


def strides(prompt: PrefillQK, unit: str) -> int | None:
    """Tokens from the start of one frame (single image) to the next, or from one raster row to the next, separators
    included; of crops, only the last raster counts. None if there is no next, or distances differ: mixed sizes, or
    dropped tokens."""
    found: int | None = prompt.once(("strides", unit), lambda: _strides(prompt, unit))
    return found


def _strides(prompt: PrefillQK, unit: str) -> int | None:
    seen = prompt.image >= 0
    before, step = [], []
    for *earlier, (_, h, w) in prompt.parts:
        before.append(sum(map(prod, earlier)))
        step.append(h * w if unit == "frame" else w)
    skip, every = (uploaded(x, seen.device)[prompt.image.clamp(min=0)] for x in (before, step))
    place = prompt.raster_index - skip
    starts = (seen & (place >= 0) & (place % every == 0)).nonzero()[:, 0]
    steps: list[int] = starts.diff().unique().tolist()
    return steps[0] if len(steps) == 1 else None


def index(q: Tensor, k: Tensor, scale: float, vertical: int, slash: int, late: int = SIZE) -> tuple[Tensor, Tensor]:
    """Vertical-slash index from the last `late` queries of [H, N, d]: columns [H, N] and distances [H, N], both
    bool."""
    n = k.shape[1]
    columns, distances, _ = (x[0] for x in probe_sums(q[None, :, -min(late, n) :], k[None], scale))
    columns[:, :FIRST] = torch.inf
    distances[:, :NEAR] = torch.inf
    taken, near = (
        torch.full((len(q),), min(n, max(c, least)), device=q.device) for c, least in ((vertical, FIRST), (slash, NEAR))
    )
    return best(columns, taken), best(distances, near)


def bands(distances: Tensor, tiles: int) -> Tensor:
    """[H, T, T] blocks of `SIZE` in which some query has a key at one of the distances [H, N]."""
    heads, n = distances.shape
    padded = pad(distances, (0, tiles * SIZE - n)).unflatten(1, (tiles, SIZE))
    near = torch.zeros(heads, tiles + 1, dtype=torch.bool, device=distances.device)
    near[:, :-1] |= padded.any(-1)
    near[:, 1:] |= padded[..., 1:].any(-1)
    t = torch.arange(tiles, device=distances.device)
    return near[:, (t[:, None] - t).clamp(min=0)] & (t[:, None] >= t)


def modalities(prompt: PrefillQK) -> tuple[tuple[Tensor, int, int], ...]:
    """For text and for images: which tokens [N] they are, and where the last run of them starts and ends."""
    found: tuple[tuple[Tensor, int, int], ...] = prompt.once("modalities", lambda: tuple(_modalities(prompt)))
    return found


def _modalities(prompt: PrefillQK) -> Iterator[tuple[Tensor, int, int]]:
    for mine in (prompt.image < 0, prompt.image >= 0):
        at = _positions(mine)
        if len(at):
            run = (at.flip(0) + torch.arange(len(at), device=at.device) == at[-1]).cumprod(0).sum()
            last, length = torch.stack([at[-1], run]).tolist()
            yield mine, last + 1 - length, last + 1


def _positions(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]


def by_modality(prompt: PrefillQK, vertical: int, slash: int, keys_too: bool) -> tuple[Tensor, Tensor]:
    """Blocks [h, T, T] and lists of keys [h, L, C] of heads that read by modality. A query block reads the
    index of each modality that it contains; `list_of_each` says which list has its keys. An index is built from the
    last queries of the modality's last run, over all keys or, with `keys_too`, over the keys of each modality
    separately; distances are then counted in keys of that modality only."""
    n, q, k = prompt.length, prompt.q, per_head(prompt.k, prompt.heads)
    tiles = -(-n // SIZE)
    blocks = torch.zeros(len(q), tiles, tiles, dtype=torch.bool, device=q.device)
    kinds, columns = modalities(prompt), list[Tensor]()
    for (mine, start, end), rows in zip(kinds, blocks_of(prompt), strict=True):
        if keys_too:
            late = last_rows(q[:, :end], k[:, :end], min(SIZE, end - start), prompt.scale)
            taken = torch.zeros(len(q), n, dtype=torch.bool, device=q.device)
            for j, (theirs, _, _) in enumerate(kinds):
                at = prompt.once(("keys", j, end), partial(_positions, theirs[:end]))
                keys, near = pair(late, mine, theirs, at, vertical, slash)
                taken |= keys
                blocks |= near
        else:
            taken, near = (
                pad(x, (0, n - end))
                for x in index(q[:, :end], k[:, :end], prompt.scale, vertical, slash, min(SIZE, end - start))
            )
            blocks |= bands(near, tiles) & rows[:, None]
        columns.append(taken)
    if len(kinds) > 1:
        columns.append(columns[0] | columns[1])
    most = max(vertical, FIRST) * len(kinds) * (len(kinds) if keys_too else 1)
    return blocks, listed(torch.stack(columns, 1), most)


def blocks_of(prompt: PrefillQK) -> Tensor:
    """[K, T] bool: which query blocks contain tokens of each of the `modalities`."""
    tokens = torch.stack([mine for mine, _, _ in modalities(prompt)])
    return pad(tokens, (0, -prompt.length % SIZE)).unflatten(1, (-1, SIZE)).any(-1)


def list_of_each(prompt: PrefillQK) -> Tensor:
    """[T] int32, for prompts with both modalities: which list of `by_modality` each query block reads, that of its
    modality, or the last one if it contains both."""
    text, images = blocks_of(prompt)
    return torch.where(text & images, 2, images).int()


def pair(late: Tensor, mine: Tensor, theirs: Tensor, at: Tensor, vertical: int, slash: int) -> tuple[Tensor, Tensor]:
    """What queries of one modality, `mine` [N], read of the keys of one modality, `theirs` [N] (`at`: positions of
    those among the first n tokens): columns [h, N] and blocks [h, T, T]. They follow from `late` [h, R, n], the
    attention of the last R of the first n tokens. The distance of a key is the number of later keys of its modality
    that the query sees; tokens of the other modality do not count."""
    heads, rows, n = late.shape
    tiles, rank = -(-len(mine) // SIZE), theirs.cumsum(0) - 1
    columns = torch.zeros(heads, len(mine), dtype=torch.bool, device=late.device)
    if not len(at):
        return columns, torch.zeros(heads, tiles, tiles, dtype=torch.bool, device=late.device)
    seen = late[..., at]
    column = seen.sum(1)
    column[:, :FIRST] = torch.inf
    columns[:, at] = best(column, torch.full((heads,), max(vertical, FIRST), device=late.device))
    distance = rank[n - rows : n, None] - rank[at]
    near = torch.zeros(heads, len(at) + 1, device=late.device)
    near.index_add_(1, torch.where(distance < 0, len(at), distance).flatten(), seen.flatten(1))
    near = near[:, :-1]
    near[:, :NEAR] = torch.inf
    taken = best(near, torch.full((heads,), max(slash, NEAR), device=late.device))
    return columns, reached(taken, mine, rank, theirs)


def reached(distances: Tensor, mine: Tensor, rank: Tensor, theirs: Tensor) -> Tensor:
    """[h, T, T] blocks of `SIZE` with a key of `theirs` at one of the distances [h, n] from a query of `mine` in the
    block. Every distance between those of the first and the last query of a block counts as reached. `rank` [N]: number
    of keys of `theirs` up to each token, minus one."""
    (low, high), (least, most) = (spans(rank, of) for of in (mine, theirs))
    count = pad(distances.cumsum(-1, dtype=torch.int32), (1, 0))
    inside = count.shape[-1] - 1
    start = (low[:, None] - most).clamp(0, inside)
    stop = (high[:, None] - least + 1).clamp(0, inside)
    t = torch.arange(len(low), device=rank.device)
    return (count[:, stop] > count[:, start]) & (stop > start) & (t[:, None] >= t)


def spans(rank: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest `rank` [N] among the tokens `of` [N] in every block of `SIZE`; for a block without such
    tokens, the smallest is larger than any rank and the largest smaller."""
    tiles = -(-len(rank) // SIZE)
    width, beyond = tiles * SIZE - len(rank), 2 * len(rank)
    low = pad(torch.where(of, rank, beyond), (0, width), value=beyond).unflatten(0, (tiles, SIZE)).amin(-1)
    high = pad(torch.where(of, rank, -beyond), (0, width), value=-beyond).unflatten(0, (tiles, SIZE)).amax(-1)
    return low, high


Lists = tuple[
    Tensor, Tensor, Tensor | None
]  # blocks [h, T, T], columns [h, L, C], dense queries [h, N] (None: none are)


def grid(prompt: PrefillQK, unit: str, rows: bool, local: int) -> Lists | None:
    """What the heads of a grid pattern read. All queries: the tokens before the images, a window, and keys on lines of
    the grid. Queries behind the grid and, with `rows`, those on its lines: everything. Lines are a stride apart; where
    they start, the phase, is where the last queries of a head look most. None if frames (rows) are not equally far
    apart, or too few for a grid."""
    n, device = prompt.length, prompt.q.device
    stride = strides(prompt, unit)
    if stride is None:
        return None
    first, end = prompt.once("span", lambda: (prompt.image >= 0).nonzero()[[0, -1], 0].tolist())
    chunk, local = stride * SIZE, -(-local // SIZE) * SIZE
    sink = max(1, -(-first // SIZE)) * SIZE
    count = (end + 1 - sink - local) // chunk * chunk
    if count <= 0:
        return None
    late = last_rows(prompt.q, per_head(prompt.k, prompt.heads), min(SIZE, n), prompt.scale).mean(1)
    region = late[:, first : first + (end + 1 - first) // stride * stride]
    phase = region.unflatten(1, (-1, stride)).sum(1).argmax(-1, keepdim=True)
    j = torch.arange(n, device=device)
    line = (j - first - phase) % stride == 0
    behind = (j >= sink + local + count).expand_as(line)
    dense = behind | (line & (j >= sink + local)) if rows else behind
    columns = listed(line & (j >= sink) & (j < sink + count), count // stride)
    blocks = window(-(-n // SIZE), sink, local, device)
    return blocks.expand(prompt.heads, -1, -1), columns[:, None], dense


def window(tiles: int, sink: int, local: int, device: torch.device) -> Tensor:
    """[T, T] blocks that contain the first `sink` and the latest `local` tokens."""
    t = torch.arange(tiles, device=device)
    return ((t[:, None] - t <= -(-local // SIZE)) | (t * SIZE < sink)) & (t[:, None] >= t)
