"""What the ops of vtoken.kernels compute, written another way: float64, one image and one number after the other,
slowly."""

from __future__ import annotations

import torch
from torch import Tensor


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def pieces(x: Tensor, lengths: list[int]) -> list[Tensor]:
    return list(x.double().split(lengths))


def cosine(a: Tensor, b: Tensor) -> float:
    """0 where one of the two has no length."""
    length = float((a @ a).sqrt() * (b @ b).sqrt())
    return float(a @ b) / length if length else 0.0


def attention(q: Tensor, k: Tensor, scale: float, first: int = 0, position: int | None = None) -> list[float]:
    """Softmax of one query over the keys from `first` up to `position` (all behind if None), 0 elsewhere."""
    last = len(k) - 1 if position is None else position
    weights = [float((q @ key * scale).exp()) if first <= j <= last else 0.0 for j, key in enumerate(k)]
    total = sum(weights)
    return [w / total for w in weights] if total else weights


def received_attention(
    q: Tensor, k: Tensor, q_lengths: list[int], k_lengths: list[int], scale: float, causal: bool
) -> list[list[float]]:
    """[ΣN][H]."""
    out = []
    for queries, keys in zip(pieces(q, q_lengths), pieces(k, k_lengths), strict=True):
        sums = [[0.0] * q.shape[1] for _ in keys]
        for i, query in enumerate(queries):
            position = len(keys) - len(queries) + i if causal else None
            for h in range(q.shape[1]):
                for j, w in enumerate(
                    attention(query[h], keys[:, h * k.shape[1] // q.shape[1]], scale, position=position)
                ):
                    sums[j][h] += w
        out += sums
    return out


def flow_scores(attention: Tensor, relevance: Tensor | None, value: Tensor, lengths: list[int]) -> list[float]:
    out, start = [], 0
    for n in lengths:
        rows = range(start, start + n)
        start += n
        parts = [attention] if relevance is None else [attention, relevance]
        totals = [sum(float(part[i]) for i in rows) for part in parts]
        for i in rows:
            flow = sum(float(part[i]) / total if total else 0.0 for part, total in zip(parts, totals, strict=True))
            out.append(flow * sum(abs(float(v)) for v in value[i]))
    return out


def nearest_tokens(
    x: Tensor, y: Tensor, x_lengths: list[int], y_lengths: list[int], among: str
) -> list[tuple[float, int]]:
    """(cosine, position in y) of every token of x."""
    out, start = [], 0
    for tokens, choice in zip(pieces(x, x_lengths), pieces(y, y_lengths), strict=True):
        for i, token in enumerate(tokens):
            best = (-float("inf"), -1)
            for j, other in enumerate(choice):
                allowed = among == "all" or (j > i if among == "later" else j != i)
                if allowed and cosine(token, other) > best[0] + 1e-9:
                    best = (cosine(token, other), start + j)
            out.append(best)
        start += len(choice)
    return out


def farthest_tokens(
    x: Tensor,
    lengths: list[int],
    counts: list[int],
    first: list[int] | None,
    strategy: str,
    worth: list[float] | None = None,
) -> list[int]:
    """Every candidate is compared with all that were taken, every time anew."""
    index, start = [], 0
    for image, (tokens, k) in enumerate(zip(pieces(x, lengths), counts, strict=True)):
        weight = worth[start : start + len(tokens)] if worth else None
        taken = [first[image] - start if first else loneliest(tokens, weight)] if k else []
        while len(taken) < k:
            best = None
            for i in (i for i in range(len(tokens)) if i not in taken):
                likeness = [cosine(tokens[i], tokens[j]) for j in taken]
                value = max(likeness) if strategy == "max_min" else sum(likeness)
                value = weight[i] * (value - 1) if weight else value
                if best is None or value < best[0] - 1e-9:
                    best = (value, i)
            assert best is not None
            taken.append(best[1])
        index += [start + i for i in taken]
        start += len(tokens)
    return index


def loneliest(tokens: Tensor, weight: list[float] | None = None) -> int:
    nearest = []
    for i in range(len(tokens)):
        others = [cosine(tokens[i], tokens[j]) for j in range(len(tokens)) if j != i]
        nearest.append(max(others, default=-1.0))
    if weight:
        nearest = [w * (value - 1) for w, value in zip(weight, nearest, strict=True)]
    return nearest.index(min(nearest))


def diverse_tokens(x: Tensor, relevance: Tensor, lengths: list[int], counts: list[int]) -> list[int]:
    """The token whose determinant with those taken is largest, by computing all determinants; for kernels of full
    rank."""
    index, start = [], 0
    for tokens, r, k in zip(pieces(x, lengths), pieces(relevance, lengths), counts, strict=True):
        size = len(tokens)
        matrix = torch.tensor(
            [[float(r[i] * r[j]) * cosine(tokens[i], tokens[j]) for j in range(size)] for i in range(size)],
            dtype=torch.float64,
        ).view(size, size)
        taken: list[int] = []
        while len(taken) < k:
            options = [[*taken, i] for i in range(size) if i not in taken]
            taken = max(options, key=lambda rows: float(torch.linalg.det(matrix[rows][:, rows])))
        index += [start + i for i in taken]
        start += size
    return index


def merge_tokens(x: Tensor, into: Tensor, slots: int, weight: Tensor | None) -> Tensor:
    rows = []
    for slot in range(slots):
        members = [i for i in range(len(x)) if int(into[i]) == slot]
        weights = [1.0 if weight is None else float(weight[i]) for i in members]
        rows.append(sum(w * x[i].double() for w, i in zip(weights, members, strict=True)) / sum(weights))
    return torch.stack(rows)


def probe_sums(q: Tensor, k: Tensor, scale: float, padding: list[int]) -> tuple[Tensor, Tensor]:
    (batch, heads, last, _), keys = q.shape, k.shape[2]
    vertical, slash = torch.zeros(2, batch, heads, keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(last):
                position = keys - last + i
                their = k[b, h * k.shape[1] // heads].double()
                for j, w in enumerate(attention(q[b, h, i].double(), their, scale, padding[b], position)):
                    if w:
                        vertical[b, h, j] += w
                        slash[b, h, position - j] += w
    return vertical, slash


def pooled_scores(q: Tensor, k: Tensor, block: int, scale: float, padding: list[int]) -> Tensor:
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    rows, columns = -(-queries // block), -(-keys // block)
    out = torch.zeros(batch, heads, rows, columns, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for r in range(rows):
                # Positions in the whole prompt, of which the queries are the end.
                held = [
                    i for i in range(r * block, min(r * block + block, queries)) if i + keys - queries >= padding[b]
                ]
                weights = {}
                for c in range(columns):
                    seen = [j for j in range(c * block, min(c * block + block, keys)) if j >= padding[b]]
                    if held and seen and c * block <= held[-1] + keys - queries:
                        mean = k[b, h * k.shape[1] // heads, seen].double().mean(0)
                        weights[c] = float((q[b, h, held].double().mean(0) @ mean * scale).exp())
                for c, w in weights.items():
                    out[b, h, r, c] = w / sum(weights.values())
    return out
