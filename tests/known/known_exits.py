"""Known answers of the stages at which all visual tokens leave, worked out by hand or by an independent definition in
float64."""

from __future__ import annotations

from dataclasses import replace
from math import erf

import gates
import pytest
import torch
from packing import tokens
from pydantic import ValidationError

from vtoken import registry
from vtoken.compressors.decoder._gates import header, save

GRIDS = ((1, 1, 2), (1, 1, 1), (1, 1, 3), (1, 1, 1))


def stage(name, **options):
    return registry.stage(name)(**options)


def images(texts, row=(0, 0, 1, 2), layer=2, **facts):
    """Four images of 2, 1, 3 and 1 tokens; `texts` stand behind them."""
    return replace(tokens(lengths=(2, 1, 3, 1), grid=GRIDS, row=row, later_text=texts, **facts), layer=layer)


def dyvte():
    by_hand()
    by_definition()
    cut = stage("dyvte", gates=gates.file(stay=(1.0, 0.5, 0.5, 0.0)))
    assert cut.layers(32) == tuple(range(1, 32))
    plan = [cut.expected_counts((10, 3), (((1, 2, 5),), ((1, 1, 3),)), (0, 1), layer) for layer in (None, 1, 2, 3)]
    assert plan == [(10, 3), (5, 2), (10, 3), (0, 0)], "of those that arrive"
    assert cut.flops((4, 2), 32) == 2 * 5 * (64 + 2) and cut.flops((0, 0), 32) == 0
    for bad in ("nothing.safetensors", __file__):
        with pytest.raises(ValidationError, match=r"train-exit|no safetensors"):
            stage("dyvte", gates=bad)


def by_hand():
    """The gate says leave where the last token's first channel is above 1.05 times the mean of those before it."""
    path = gates.file(seed=0, depth=3, width=2).replace("0-3-2", "by hand")
    first, second = torch.tensor([[1.05, 0, 0, 0], [0, 0, 1.0, 0]]), torch.eye(2)
    save(path, {1: (first, second), 2: (first.clone(), second.flip(0))}, (1.0, 1.0, 1.0), {})
    assert header(path)[:3] == (3, 2, 2)
    # The last token is no part of the mean: with it, it would be 2.05 and the images would stay.
    two = torch.tensor([[1.0, 0], [3, 0], [2.15, 0]])
    behind = [torch.cat([torch.tensor([[9.0, 9]]), two]), two, 0 * two, two[2:]]
    found = stage("dyvte", gates=path).select(images(behind, layer=1))
    assert found.lengths == (0, 0, 3, 1), "both images of row 0 leave; equal numbers stay; one word has no mean"
    assert found.index.tolist() == [3, 4, 5, 6]
    assert stage("dyvte", gates=path).select(images(behind, layer=2)).lengths == (2, 1, 3, 1), "each layer has its own"


def by_definition():
    path = gates.file(seed=4)
    weights = load(path)
    generator = torch.Generator().manual_seed(1)
    for layer in (1, 2, 3):
        behind = [torch.randn(n, 32, generator=generator) for n in (7, 4, 2, 3)]
        found = stage("dyvte", gates=path).select(images(behind, layer=layer))
        want = [leaves(weights, layer, behind[k]) for k in (1, 1, 2, 3)]
        assert found.lengths == tuple(0 if out else n for out, n in zip(want, (2, 1, 3, 1), strict=True))


def load(path):
    from safetensors.torch import load_file

    return {name: matrix.tolist() for name, matrix in load_file(path).items()}


def leaves(weights, layer, text):
    """Two layers of a perceptron, number by number."""
    *before, last = text.double().tolist()
    shown = [sum(column) / len(before) for column in zip(*before, strict=True)] + last
    inner = [sum(w * s for w, s in zip(row, shown, strict=True)) for row in weights[f"{layer}.in"]]
    inner = [x * (1 + erf(x / 2**0.5)) / 2 for x in inner]
    stay, leave = (sum(w * x for w, x in zip(row, inner, strict=True)) for row in weights[f"{layer}.out"])
    return leave > stay


def todre_exit():
    words = [torch.ones(n, 2) for n in (5, 2, 4, 0)]
    attention = torch.tensor([0.125, 0.125, 0.25, 0.2, 0.2, 0.05, 0.0])
    cut = stage("todre_exit", threshold=0.5)
    found = cut.select(images(words, text_attention=attention))
    assert found.lengths == (2, 1, 0, 1), "half is not less than half; without text behind it an image stays"
    assert found.index.tolist() == [0, 1, 2, 6]
    apart = cut.select(images(words, row=(0, 1, 2, 3), text_attention=attention))
    assert apart.lengths == (0, 0, 0, 1), "the images of a row count together"
    assert cut.expected_counts((4, 2), (), ()) == (4, 2)
    assert stage("todre_exit").threshold == 0.1
    assert stage("todre_exit").layers(32) == (28,) and stage("todre_exit").layers(28) == (24,)
    assert stage("todre_exit").layers(4) == (3,) and stage("todre_exit", at=(2, 5)).layers(32) == (2, 5)
    raters = [r.tolist() for r in cut.query_tokens(images(words))]
    assert raters == [[3, 4], [0, 1], [0, 1, 2, 3], []], "of image 0, what stands behind image 1 too"


def attention_exit():
    words = [torch.ones(n, 2) for n in (5, 2, 4, 0)]
    low, high = torch.full((7,), 0.01), torch.full((7,), 0.5)

    def counts(cut, *seen):
        memory: dict = {}
        return [cut.select(replace(images(words, text_attention=a), memory=memory)).lengths for a in seen]

    stays, leaves = (2, 1, 3, 1), (0, 0, 0, 1)
    assert counts(stage("attention_exit"), high, low) == [stays, leaves]
    patient = stage("attention_exit", patience=2)
    assert counts(patient, low, high, low, low) == [stays, stays, stays, leaves], "two in a row"
    sink = torch.tensor([0.9, 0.01, 0.9, 0.01, 0.9, 0.01, 0.9])
    assert counts(stage("attention_exit"), sink) == [stays]
    assert counts(stage("attention_exit", sinks=1), sink) == [leaves], "of every image, at least one token"
    cut = stage("attention_exit", window=3)
    assert [r.tolist() for r in cut.query_tokens(images(words))] == [[3, 4], [0, 1], [1, 2, 3], []]
    assert cut.layers(32) == (28, 29, 30, 31) and cut.layers(4) == (3,)
    assert stage("attention_exit", first=20).layers(22) == (20, 21)
