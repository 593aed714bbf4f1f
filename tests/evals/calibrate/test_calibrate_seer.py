"""SeerAttention's gates: what they learn from, that they learn it, and the command around them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from known_sparse import heads_of, prompt

import vtoken
from vtoken.cli import main
from vtoken.compressors.attention._seer import header, logits, matrices, pooled
from vtoken.evals import reference
from vtoken.evals.calibrate import _train_block_gates as seer
from vtoken.evals.shared import samples


def test_maps_are_those_of_the_attention():
    """One query at a time: the largest share and the sum of every pair of blocks."""
    p = prompt(75)
    target, mass = seer.maps(p, 16)
    for h, q, k in heads_of(p):
        most, total = torch.zeros(5, 5), torch.zeros(5, 5)
        for i in range(75):
            for j, share in enumerate((k[: i + 1] @ q[i] * p.scale).softmax(0).tolist()):
                at = i // 16, j // 16
                most[at] = max(most[at], share)
                total[at] += share / (16 if i < 64 else 11)
        torch.testing.assert_close(target[h], most / most.sum(1, keepdim=True), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(mass[h], total, atol=1e-6, rtol=1e-5)


def seen_of(p, size=16):
    return seer.Seen(*pooled(p, size), p.rope.starts(size), *seer.maps(p, size))


def test_divergence_is_of_the_target_and_leaves_the_first_rows_out():
    seen = seen_of(prompt(140))
    gate = torch.randn(4, 48, 16, generator=torch.Generator().manual_seed(0))
    said = logits(seen.queries, seen.keys, gate, seen.starts).double().softmax(-1)
    want = [
        sum(float(t * (t / s).log()) for t, s in zip(seen.target[h, r, : r + 1].double(), said[h, r], strict=False))
        for h in range(4)
        for r in range(2, 9)
    ]
    assert seer.divergence(gate, seen).item() == pytest.approx(sum(want) / len(want), rel=1e-4)


def test_the_judge_counts():
    """Two layers of two prompts. A gate that is zero gives every block the same share."""
    kept = [[seen_of(prompt(96, seed=s)) for s in pair] for pair in ((1, 2), (3, 4))]
    gates = [torch.zeros(4, 48, 16)] * 2
    found = seer.judge(gates, kept, 0, 16, 0.22, 0)
    # above 0.22 are rows of up to four blocks; rows 4 and 5 read the first and their own
    assert found["density"] == [pytest.approx((1 + 2 + 3 + 4 + 2 + 2) / 21)] * 2
    for layer in range(2):
        recall = []
        for prompt_ in kept:
            mass = prompt_[layer].mass
            recall.append(torch.cat([mass[:, :4].sum(-1), mass[:, [4, 5], 0] + mass[:, [4, 5], [4, 5]]], 1).mean())
        assert found["recall"][layer] == pytest.approx(float(sum(recall) / 2), rel=1e-4)
        assert found["recall"][layer] < found["best"][layer] < 1
    starts = [seer.untrained(kept[0][k], 0, k) for k in range(2)]
    means = [(seer.divergence(starts[k], kept[0][k]) + seer.divergence(starts[k], kept[1][k])) / 2 for k in range(2)]
    assert found["before"] == pytest.approx([float(m) for m in means], rel=1e-4) and starts[0].std() < 0.03


def test_training_is_repeatable_and_takes_its_settings():
    known = [[replace(seen_of(prompt(96, seed=s)))] for s in range(3)]
    device = torch.device("cpu")
    first, again, other = (
        seer.train(known, seer.Training(steps=5, batch=2, rate=rate), device)[0] for rate in (1e-2, 1e-2, 1e-3)
    )
    assert torch.equal(first, again) and not torch.equal(first, other) and not first.requires_grad
    start = seer.untrained(known[0][0], 0, 0)
    assert 0 < float((other - start).abs().max()) <= 5 * 1e-3 * 1.01, "Adam moves at most a rate per step"


def mine(folder):
    """A question each about 25 pictures."""
    file, asked = folder / "mine.jsonl", reference.questions(150)[::6]
    file.write_text("".join(json.dumps({"image": str(q.image), "question": q.question}) + "\n" for q in asked))
    return file


def test_calibrate_writes_gates_that_say_more_than_untrained_ones(tmp_path, capsys):
    """On pictures that were kept back; the numbers are those of the wrapped model."""
    data, file = mine(tmp_path), tmp_path / "gates.safetensors"
    words = ["calibrate", "seerattention", "tiny-llava", "--data", str(data), "--size", "32", "--device", "cpu"]
    assert main([*words, "--steps", "25", "--batch", "4", "--threshold", "0.03", "-o", str(file), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["prompts"] == 20 and out["kept_back"] == 5 and out["blocks"] == 19 and out["file"] == str(file)
    assert all(after < 0.6 * before for before, after in zip(out["before"], out["after"], strict=True))
    assert all(d < r <= b + 1e-6 for d, r, b in zip(out["density"], out["recall"], out["best"], strict=True))
    assert header(str(file)) == (4, 2, 2, 64, 32) and out["pipeline"] == f"seerattention:gates={file}"
    model, processor = reference.load()
    densities = []
    with vtoken.wrapped(model, [{"seerattention": {"gates": str(file), "min_len": 0, "threshold": 0.03}}]):
        for sample in samples.read(str(data))[4::5]:
            with torch.no_grad():
                model(**samples.prepare(model, processor, sample))
            densities.append(vtoken.trace(model).stages[0].density[0])
    assert sum(densities) / 5 == pytest.approx(out["density"][0], rel=1e-3) and densities[0] < 0.9


def test_calibrate_prints_a_table(tmp_path, capsys):
    file = tmp_path / "gates.safetensors"
    words = ["--data", str(mine(tmp_path)), "--limit", "5", "--steps", "1", "--dtype", "bfloat16", "-o", str(file)]
    assert main(["calibrate", "seerattention", "tiny-llava", *words]) == 0
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("│")] == list("0123")
    assert "of the blocks at threshold 0.002, on 1 prompts kept back" in out
    assert matrices(str(file))[3].dtype == torch.bfloat16, "as the model"
    assert header(str(file)).size == 64


@pytest.mark.parametrize(
    "words, message",
    [
        (["--limit", "24", "-o", "x"], "at least 5 pictures"),
        (["-o", "no/x"], "no folder 'no'"),
        (["--rate", "0", "-o", "x"], "--rate must be above 0"),
        (
            ["--limit", "30", "--size", "256", "-o", "x"],
            "a prompt of 3 blocks of 256 tokens, and gates learn from 4 on",
        ),
    ],
)
def test_bad_arguments_are_named(words, message, capsys):
    assert main(["calibrate", "seerattention", "tiny-llava", "--data", "reference", *words]) == 2
    assert message in capsys.readouterr().err
