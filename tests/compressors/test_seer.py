"""SeerAttention inside models: what it is handed is from before RoPE, and files of gates that do not fit."""

from __future__ import annotations

from typing import Any

import gates
import pytest
import tiny
import torch
from batches import long
from modes import LOGITS, greedy, whole
from safetensors.torch import save_file

import vtoken
from vtoken import config
from vtoken.compressors.attention import _seer
from vtoken.errors import ConfigError, OtherModelError, UnsupportedError
from vtoken.stages.attention import SparseAttention, SparseMask, everything
from vtoken.stages.cache import norm_of


class Undone(SparseAttention):
    """Reads all and keeps queries and keys from before RoPE. No paper."""

    rope = True
    min_len: int = 0
    seen: Any = None

    def reads(self, prompt):
        n, rope = prompt.length, prompt.rope
        torch.testing.assert_close(rope.turn(rope.undo(prompt.q)), prompt.q.float(), atol=1e-4, rtol=1e-4)
        starts = rope.starts(16).turn(rope.undo(prompt.k)[:, ::16])
        torch.testing.assert_close(starts, prompt.k[:, ::16].float(), atol=1e-4, rtol=1e-4)
        self.seen.append((prompt.layer, rope.undo(prompt.q), rope.undo(prompt.k)))
        return SparseMask(16, everything(prompt.heads, n, n, 16, prompt.q.device))


def unrotated(attention, seen, undo):
    """Notes what an attention has just before it rotates: the outputs of its norms, or of its projections."""
    for name in ("q", "k"):
        module = norm_of(attention, name) or getattr(attention, f"{name}_proj")

        def note(module, args, output, name=name):
            wide = output.view(*output.shape[:2], -1, attention.head_dim)
            seen.append((attention.layer_idx, name, wide.transpose(1, 2)))

        undo.append(module.register_forward_hook(note))


def compare(model, batch, stages):
    """Every row with pictures and every layer of a prefill: what the stage undid against what the model had."""
    seen, true, undo = [], [], []
    attending = tiny.family(model).attending
    for k in attending:
        unrotated(model.get_decoder().layers[k].self_attn, true, undo)
    with vtoken.wrapped(model, [*stages, Undone(seen=seen)]), torch.no_grad():
        model(**batch, logits_to_keep=1)
    rows = [r for r, row in enumerate(batch["input_ids"].tolist()) if model.config.image_token_id in row]
    for hook in undo:
        hook.remove()
    assert [layer for layer, *_ in seen] == [k for k in attending for _ in rows]
    lengths = []
    for number, (layer, q, k) in enumerate(seen):
        for name, got in (("q", q), ("k", k)):
            (whole,) = [x for at, which, x in true if (at, which) == (layer, name)]
            lengths.append(got.shape[1])
            want = whole[rows[number % len(rows)], :, -got.shape[1] :]
            torch.testing.assert_close(got, want.float(), atol=2e-5 * float(want.abs().max()), rtol=1e-4)
    return lengths


@whole
def test_what_is_undone_is_what_the_model_had(family):
    """Left-padded rows, tokens dropped before the decoder and inside it; with M-RoPE for Qwen."""
    model = tiny.make(family)
    batch = tiny.build(model, [[40, "img", 1, "img", 20], [1, "img", 30], [60]], seed=3)
    lengths = compare(model, batch, [{"fastervlm": {"keep": "80%"}}, {"fastv": {"keep": 5, "layer": 2}}])
    assert len(set(lengths[:4])) == 2 and lengths[-4] < lengths[0]


@pytest.mark.parametrize("text", ["glm", "qwen3"])
def test_other_rotations(text):
    """Half of each head turns, neighbouring channels in pairs; and norms before RoPE."""
    model = tiny.make("llava", text=text, **({"partial_rotary_factor": 0.5} if text == "glm" else {}), head_dim=8)
    cos, _ = model.get_decoder().rotary_emb(torch.zeros(1, 3, 32), torch.arange(3)[None])
    assert cos.shape[-1] == (4 if text == "glm" else 8)
    compare(model, tiny.build(model, long("llava"), seed=3), [])


def test_a_factor_on_attention_is_divided_out():
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
    model = tiny.make("llava", rope_parameters=yarn)
    cos, sin = model.get_decoder().rotary_emb(torch.zeros(1, 3, 32), torch.arange(3)[None])
    assert float((cos**2 + sin**2).min()) > 1.2
    compare(model, tiny.build(model, long("llava"), seed=3), [])


def test_what_turns_elsewhere_is_refused():
    with pytest.raises(UnsupportedError, match="needs queries and keys from before RoPE, and PhiAttention is not"):
        vtoken.wrap(tiny.make("llava", text="phi"), [Undone()])


@whole
def test_at_threshold_0_the_model_is_itself(family):
    model = tiny.make(family)
    batch = tiny.build(model, [[40, "img", 1, "img", 20], [1, "img", 30]], seed=3)
    want = greedy(model, batch, **LOGITS)
    stage = {"seerattention": {"gates": gates.seer(), "threshold": 0.0, "min_len": 0}}
    with vtoken.wrapped(model, [stage]):
        got = greedy(model, batch, **LOGITS)
        assert all(s.density == [1.0, 1.0] for s in vtoken.trace(model).stages)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4)
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("family", tiny.each("mrope", window=None))
def test_drafts_and_static_caches_have_no_say(family):
    model = tiny.make(family)
    batch = tiny.build(model, [[150, "img", 40]], seed=3)
    with vtoken.wrapped(model, [{"seerattention": {"gates": gates.seer(), "threshold": 0.1, "min_len": 0}}]):
        plain = greedy(model, batch)
        densities = [s.density for s in vtoken.trace(model).stages]
        assert 0 < densities[0][0] < 0.9
        one = {k: v for k, v in batch.items() if k != "attention_mask"}
        for inputs, options in ((batch, {"cache_implementation": "static"}), (one, {"prompt_lookup_num_tokens": 3})):
            assert torch.equal(greedy(model, inputs, **options), plain)
            assert [s.density for s in vtoken.trace(model).stages] == densities


@pytest.mark.parametrize("family", tiny.each("mrope", window=None))
def test_compiled_prefill(family):
    model = tiny.make(family)
    batch = tiny.build(model, [[150, "img", 40]], seed=3)
    with vtoken.wrapped(model, [{"seerattention": {"gates": gates.seer(), "threshold": 0.1, "min_len": 0}}]):
        with torch.no_grad():
            want = model(**batch).logits
            densities = [s.density for s in vtoken.trace(model).stages]
            torch._dynamo.reset()
            got = torch.compile(model, backend="eager")(**batch).logits
        assert [s.density for s in vtoken.trace(model).stages] == densities and densities[0][0] < 0.9
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_gates_of_another_model_are_refused():
    model = tiny.make("llava")
    for options, error, words in (
        ({"depth": 3}, OtherModelError, "3 layers of 4 query heads on 2 key heads of width 8, this model has 4 layers"),
        ({"heads": (4, 4)}, UnsupportedError, "on 4 key heads .* this model has 4 query heads on 2 key heads"),
        ({"width": 16}, UnsupportedError, "of width 16, this model has .* of width 8; train gates for it"),
    ):
        with pytest.raises(error, match=words):
            vtoken.wrap(model, [{"seerattention": {"gates": gates.seer(**options)}}])


def test_unmerging_and_seerattention_do_not_go_together():
    with pytest.raises(UnsupportedError, match=r"stage vtu .* seerattention"):
        vtoken.wrap(tiny.make("llava"), ["vtu", {"seerattention": {"gates": gates.seer()}}])


def test_files_that_hold_no_gates(tmp_path):
    text, other, odd, some, few = (tmp_path / f"{name}.safetensors" for name in "abcde")
    text.write_text("gates")
    save_file({"x": torch.zeros(1)}, other, {"format": "other"})
    _seer.save(odd, [torch.zeros(1, 24, 8)], 1, 48, {})
    save_file({"0": torch.zeros(1, 24, 8)}, some, {"format": _seer.FORMAT, "depth": "1"})
    told = {"format": _seer.FORMAT, "depth": "2", "heads": "1", "key_heads": "1", "width": "8", "size": "16"}
    save_file({"0": torch.zeros(1, 24, 8)}, few, told)
    for file, words in (
        (tmp_path / "none", "no file .*; `vtoken calibrate seerattention MODEL"),
        (text, "is no safetensors file"),
        (other, "format 'other', not 'vtoken seerattention 1'"),
        (odd, "blocks of 48 tokens; 16, 32, 64, 128, 256 can be had"),
        (gates.file(), "format 'vtoken dyvte 1'"),
        (some, "says nothing for 'heads', expected a whole number"),
        (few, "has no tensor '1', expected one of shape"),
    ):
        with pytest.raises(ConfigError, match=words):
            config.load([{"seerattention": {"gates": str(file)}}])


def test_the_authors_files_are_read(tmp_path):
    """Their names and shapes; the file does not tell key heads. Their other kinds of gates are refused."""
    file = tmp_path / "attn_gate_weights.pth"
    names = [f"model.layers.{k}.self_attn.attn_gate.mask_linear_k.weight" for k in (0, 2, 1, 3)]
    g = torch.Generator().manual_seed(1)
    matrices = {name: torch.randn(4, 24, 8, generator=g) / 8 for name in names}
    torch.save(matrices, file)
    assert _seer.header(str(file)) == (4, 4, 0, 8, 64)
    assert torch.equal(_seer.matrices(str(file))[1], matrices[names[2]])
    model = tiny.make("llava")
    with vtoken.wrapped(model, [{"seerattention": {"gates": str(file), "min_len": 0, "last": 0, "threshold": 0.99}}]):
        greedy(model, tiny.build(model, [[150, "img", 60]], seed=3), 1)
        (density,) = vtoken.trace(model).stages[0].density
        assert density == pytest.approx(7 / 10), "four blocks of 64: the first and the diagonal"
    for number, (found, words) in enumerate((
        ({**matrices, names[0].replace("_k", "_q"): torch.zeros(4, 8, 8)}, "of the authors' gates the default kind"),
        ({name: torch.zeros(4, 16, 8) for name in names}, "of shape \\[4, 16, 8\\], expected \\[heads, 3 D, D\\]"),
        ({}, "does not hold one matrix"),
        ({name: torch.zeros(24, 8) for name in names}, r"expected \[heads, 3 D, D\]"),
        ({0: torch.zeros(4, 24, 8)}, "no file of tensors"),
        ({name: 0 for name in names}, "no file of tensors"),
    )):  # fmt: skip
        other = tmp_path / f"{number}.pth"
        torch.save(found, other)
        with pytest.raises(ValueError, match=words):
            _seer.header(str(other))
    (tmp_path / "text.pth").write_text("gates")
    with pytest.raises(ValueError, match="no file of tensors"):
        _seer.header(str(tmp_path / "text.pth"))
