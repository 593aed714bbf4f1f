"""`vtoken calibrate dtome`: thresholds by hand, exact on their own batch, and the same after an interruption."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image
from safetensors import safe_open

import vtoken
from vtoken import config, registry
from vtoken.cli import main
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.evals.calibrate import _batches, dtome
from vtoken.evals.calibrate.dtome import pictures
from vtoken.hooks.state.token_history import TokenHistory
from vtoken.stages import Fact, VisualTokens


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures, plain ones among them; some in a sub-folder, and a file that is none."""
    generator = np.random.default_rng(0)
    (tmp_path / "more").mkdir()
    for k in range(12):
        noise = generator.integers(0, 255, (56, 56, 3)) * (k % 4 > 0) + 10 * k
        Image.fromarray(noise.clip(0, 255).astype("uint8")).save(tmp_path / ("more" if k % 2 else "") / f"{k:02}.png")
    (tmp_path / "readme.txt").write_text("no picture")
    return tmp_path


class Pixels:
    """An image processor that counts its calls."""

    def __init__(self, family="llava", side=56):
        self.calls, self.side, one = 0, side, tiny.family(family)
        self.varlen, self.by_grids, self.split = one.varlen, one.by_grids, one.split

    def __call__(self, images, return_tensors):
        self.calls += 1
        images = [image.resize((self.side, self.side)) for image in images]
        pixels = torch.stack([torch.tensor(np.asarray(i)).permute(2, 0, 1) / 127.5 - 1 for i in images])
        if not self.varlen:
            # Where text parts crops, those of a row are kept apart; a crop of zeros is padding.
            padded = torch.stack([pixels, torch.zeros_like(pixels)], 1)
            return {"pixel_values": padded if self.split else pixels}
        # Any order of patches will do; every other picture is half as high.
        grids = [(1, 4, 4) if k % 2 else (1, 2, 4) for k in range(len(images))]
        patches = pixels.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        found = [p[: h * w] for p, (_, h, w) in zip(patches, grids, strict=True)]
        found = [p.unflatten(1, (3, 14, 14)) if self.by_grids else p.repeat(1, 2) for p in found]
        return {"pixel_values": torch.cat(found), "image_grid_thw": torch.tensor(grids)}


def calibrate(model, pixels, files, out, **options):
    asked = dtome.Settings(model="", images=files[0].parent, out=out, **options)
    return dtome.calibrate(model, pixels, files, asked)


def test_schedules():
    constant, linear = (_batches.schedule(kind, 504, 24) for kind in ("constant", "linear"))
    assert constant == (21,) * 24 and sum(linear) == 504
    assert linear[:4] == (42, 40, 38, 36) and _batches.schedule("reverse_linear", 504, 24) == linear[::-1]
    assert _batches.schedule("constant", 10, 4) == (3, 3, 2, 2)
    for total in range(1, 200):
        for kind in _batches.SCHEDULES:
            merges = _batches.schedule(kind, total, 24)
            assert min(merges) >= 0 and total / 2 <= sum(merges) + 24 and sum(merges) <= total


def test_a_batch_shares_its_merges():
    learned = _batches.Learned((1, 4, 0, 1), 4)
    value = torch.tensor([[0.9, 0.5], [0.8, 0.95], [0.3, -torch.inf]])
    assert learned.cut(value, (4, 4, 4), 0) == (1, 2, 0) and learned.thresholds[0].item() == pytest.approx(0.5)
    assert learned.cut(value, (4, 4, 3), 1) == (2, 2, 1) and learned.thresholds[1].item() == pytest.approx(0.3)
    assert learned.cut(value, (4, 4, 3), 2) == (0, 0, 0) and learned.left[2].item() == 11 / 12
    assert learned.cut(-value.abs(), (4, 4, 3), 3)[2] == 1 and learned.thresholds[3].item() == 0, "clamped"
    learned.batches = 1
    learned.cut(value - 0.1, (4, 4, 4), 0)
    assert learned.thresholds[0].item() == pytest.approx((0.5 + 0.4) / 2)
    found = learned.tensors()
    assert found["thresholds"][2] > 1 and found["thresholds"].dtype == torch.float64


@pytest.mark.parametrize("lead", [0, 1])
def test_every_picture_is_dealt_out_anew(lead):
    """Against the authors' calibration on lists: after a merge anywhere in the batch, side A and then side B, in every
    picture."""
    g, depth, n = torch.Generator().manual_seed(4), 4, 12
    learned = _batches.Learned((1, 2, 1, 1), n)
    stage, memory = _batches.learner(registry.stage("dtome"), learned), {}
    x, lineage = torch.zeros(3 * n, 1), TokenHistory((n,) * 3, torch.arange(n).repeat(3), (n,) * 3)
    sequences, idle = [[[k] for k in range(n)] for _ in range(3)], 0
    for layer in range(depth):
        every = torch.randn(3, n, 4, generator=g) + 0.6
        every[1] -= 0.9 * (layer < 2)  # loses nothing at first
        image = torch.arange(3).repeat_interleave(torch.tensor(lineage.lengths))
        seen = VisualTokens.pack(
            x,
            lineage.lengths,
            [((1, 1, n),)] * 3,
            range(3),
            lineage.raster_index,
            facts={Fact("mean_key"): every[image, lineage.raster_index]},
            layer=layer,
            memory=memory,
            lead=lead,
        )
        keep = stage.select(seen)
        x, lineage = keep.apply(x), lineage.advance(keep)
        edges = []
        for i, groups in enumerate(sequences):
            a, b = groups[lead::2], groups[1 - lead :: 2]
            for member in a:
                cosine = [torch.cosine_similarity(every[i, member[0]], every[i, other[0]], 0).item() for other in b]
                edges.append((max(cosine), i, member, b[cosine.index(max(cosine))]))
        edges.sort(key=lambda e: -e[0])
        total = 3 * learned.merges[layer]
        for _, _, member, other in edges[:total]:
            other += member
        assert learned.thresholds[layer].item() == pytest.approx(max(0, edges[total][0]), abs=1e-6)
        gone = {(i, m[0]) for _, i, m, _ in edges[:total]}
        idle += len({i for i, _ in gone}) < 3
        for i, groups in enumerate(sequences):
            left = [m for m in groups[lead::2] if (i, m[0]) not in gone]
            sequences[i] = left + groups[1 - lead :: 2]
            assert sorted(m[0] for m in sequences[i]) == lineage.kept()[i].tolist()
    assert idle, "a picture that loses nothing in a layer"


@pytest.mark.parametrize("budget, per_layer", [("low", 4), ("mid", 3), ("high", 1)])
def test_one_batch_gives_its_own_mean_count(folder, tmp_path, budget, per_layer):
    """While learning a batch loses what the budget says; with its thresholds about as much, and not every picture the
    same."""
    model, out = tiny.llava(), tmp_path / "thresholds.safetensors"
    files = pictures(folder)
    calibrate(model, Pixels(), files, out, budget=budget)
    stage = registry.stage("dtome")(thresholds=str(out))
    batch = tiny.build(model, [["img", 1]] * 12)
    batch["pixel_values"] = Pixels()([Image.open(f) for f in files], "pt")["pixel_values"]
    with vtoken.wrapped(model, stage), torch.no_grad():
        model(**batch)
        trace = vtoken.trace(model)
    counts = [sum(s.tokens_out) for s in trace.stages]
    learned = [round(192 * share) for share in stage.left[:3]]
    # Of pictures of odd length one token fewer than half can merge: at the low budget not all find a pair.
    assert learned[:2] == [12 * (16 - per_layer * (k + 1)) for k in range(2)]
    assert learned[2] == 12 * (16 - per_layer * 3) + 3 * (budget == "low")
    # Behind the first layer pictures that lost nothing were dealt out anew while learning, and keep their order here.
    assert counts[0] == learned[0] and counts[1:] == pytest.approx(learned[1:], rel=0.05)
    assert len(set(trace.tokens_out)) > 1
    assert stage.expected_counts((16,), (((1, 4, 4),),), (0,), 1) == (16 - 2 * per_layer,)
    assert stage.thresholds[3] > 1, "behind the layer that features are read from"
    again = config.load(yaml.safe_load(config.dump(config.load([stage]))))
    assert again.stages[0] == stage, "a pipeline written out holds the numbers"


def test_it_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    model, files = tiny.llava(), pictures(folder)
    whole = calibrate(model, Pixels(), files, tmp_path / "whole", batch_size=4)

    def stop(what, share):
        if share == 8 / len(files):
            raise KeyboardInterrupt

    first, second, third = Pixels(), Pixels(), Pixels()
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(dtome, "say", stop)
        calibrate(model, first, files, tmp_path / "out", batch_size=4)
    found = calibrate(model, second, files, tmp_path / "out", batch_size=4)
    assert (first.calls, second.calls) == (2, 1)
    assert all(torch.equal(found[k], whole[k]) for k in ("thresholds", "left"))
    again = calibrate(model, third, files, tmp_path / "out", batch_size=4)
    assert third.calls == 0 and torch.equal(again["thresholds"], whole["thresholds"])
    with pytest.raises(ConfigError, match=r"another calibration \(budget 'mid', not 'low'\)"):
        calibrate(model, third, files, tmp_path / "out", batch_size=4, budget="low")
    with pytest.raises(ConfigError, match="another calibration"):
        calibrate(model, third, files[:-1], tmp_path / "out", batch_size=4)
    (tmp_path / "out").write_text("x" * 20)
    with pytest.raises(ConfigError, match="not a file of thresholds"):
        calibrate(model, third, files, tmp_path / "out", batch_size=4)


@pytest.mark.parametrize("family", tiny.families(varlen=True, by_rows=False))
def test_qwen_gets_rounds_behind_its_tower(family, folder, tmp_path):
    model, out, files = tiny.make(family), tmp_path / "out", pictures(folder)
    learned = calibrate(model, Pixels(family), files, out, budget="high", rounds=2)
    stage = config.load([{"dtome_post": {"thresholds": str(out)}}]).stages[0]
    assert stage.thresholds == tuple(learned["thresholds"].tolist()) and len(stage.thresholds) == 2
    rows = [[1, ("img", (1, 4, 4) if k % 2 else (1, 2, 4)), 1] for k in range(12)]
    batch = tiny.build(model, rows)
    batch["pixel_values"] = Pixels(family)([Image.open(f) for f in files], "pt")["pixel_values"]
    with vtoken.wrapped(model, stage), torch.no_grad():
        model(**batch)
        seen = vtoken.trace(model)
    assert sum(seen.visual_tokens) == 36
    assert sum(seen.tokens_out) == round(36 * learned["left"][-1].item()) == 36 - 2 * 6
    with pytest.raises(ConfigError, match="holds the thresholds of 'dtome_post', not those of dtome"):
        config.load([{"dtome": {"thresholds": str(out)}}])


@pytest.mark.parametrize("family", tiny.families(varlen=False, unit=4, crops_sized=False))
def test_rounds_behind_a_padded_tower(family, folder, tmp_path):
    model, out, files = tiny.make(family), tmp_path / "out", pictures(folder)
    one = [1, ("img", (0, 0)) if tiny.family(family).split else "img", 1]
    side = max(np.ravel(model.config.vision_config.image_size).tolist())
    pixels = Pixels(family, side)
    learned = calibrate(model, pixels, files, out, budget="high", rounds=2)
    stage = config.load([{"dtome_post": {"thresholds": str(out)}}]).stages[0]
    batch = tiny.build(model, [one] * 12)
    given = pixels([Image.open(f) for f in files], "pt")["pixel_values"]
    batch["pixel_values"] = given
    with vtoken.wrapped(model, stage), torch.no_grad():
        model(**batch)
        seen = vtoken.trace(model)
    total = 12 * tiny.adapter(model).patches // 4
    assert sum(seen.visual_tokens) == total
    assert sum(seen.tokens_out) == round(total * learned["left"][-1].item()) < total


@pytest.mark.parametrize("family", tiny.families(crops_sized=True))
def test_rounds_behind_a_tower_of_crops_of_their_own_size(family, folder, tmp_path):
    model, out = tiny.make(family), tmp_path / "out"
    batch = tiny.build(model, [[1, ("img", (84, 112 if k % 2 else 84)), 1] for k in range(12)], seed=3)
    pixels = {name: batch[name] for name in ("pixel_values", "spatial_shapes", "pixel_attention_mask")}
    learned = calibrate(model, lambda images, return_tensors: pixels, pictures(folder), out, budget="high", rounds=2)
    stage = config.load([{"dtome_post": {"thresholds": str(out)}}]).stages[0]
    with vtoken.wrapped(model, stage), torch.no_grad():
        model(**batch)
        seen = vtoken.trace(model)
    assert sum(seen.visual_tokens) == 6 * (9 + 12)
    assert sum(seen.tokens_out) == round(126 * learned["left"][-1].item()) < 126


def test_what_files_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no file 'nowhere\.safetensors'"):
        config.load("dtome:thresholds=nowhere.safetensors")
    with pytest.raises(ConfigError, match="no pictures there"):
        pictures(tmp_path / "nothing")
    out = tmp_path / "out"
    calibrate(tiny.llava(), Pixels(), pictures(folder)[:2], out)
    model = tiny.llava()
    with pytest.raises(UnsupportedError, match="encoder of 3 layers, this one has 4"):
        vtoken.wrap(
            model, [{"dtome": {"thresholds": list(registry.stage("dtome")(thresholds=str(out)).thresholds[:3])}}]
        )
    (folder / "00.png").write_text("broken")
    with pytest.raises(ConfigError, match=r"cannot read picture .*00\.png"):
        calibrate(tiny.llava(), Pixels(), pictures(folder), tmp_path / "other")


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "t.safetensors"
    line = [
        "calibrate",
        "dtome",
        "tiny-llava",
        "--images",
        str(folder),
        "-o",
        str(out),
        "--limit",
        "4",
        "--device",
        "cpu",
    ]
    assert main(line) == 0
    assert "4 pictures" in capsys.readouterr().out
    with safe_open(out, "pt") as file:
        about = file.metadata()
        assert file.get_tensor("thresholds").isfinite().any()
    assert about["method"] == "dtome" and about["batches"] == "1" and about["model"] == "tiny-llava"
    assert main([*line, "--budget", "low"]) != 0
