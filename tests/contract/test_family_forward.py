"""Calling a wrapped model directly, on every family: losses, scores, embeddings, decoding by hand, offloaded and
quantised weights."""

from __future__ import annotations

import modes
import oracle
import pytest
import tiny
import torch
from accelerate import cpu_offload, dispatch_model
from modes import ROWS, STAGES, every, families, greedy
from packaging.version import Version
from probes import Deep, Inside, Ragged, Recorder
from usual import stage

import vtoken
from vtoken import registry
from vtoken.errors import UnsupportedError


@pytest.fixture
def model(family):
    return tiny.make(family)


@pytest.fixture
def batch(model):
    return tiny.build(model, modes.ROWS, seed=3)


@every
def test_labels_logits_and_gradients(model, batch, pipeline):
    """Logits keep the prompt's shape; labels on text give the loss of the kept positions; logits_to_keep works;
    gradients flow."""
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    labels = ids.masked_fill((ids == tiny.IMG) | ~real, -100)
    labels[:, 1:][ids[:, :-1] == tiny.IMG] = -100
    with vtoken.wrapped(model, STAGES[pipeline]):
        out = model(**batch, labels=labels)
        assert out.logits.shape[:2] == ids.shape
        out.loss.backward()
        # Labels move the end of the prompt, which some stages read: the same calls without them.
        whole = model(**batch).logits
        last = model(**batch, logits_to_keep=1).logits
        quiet = model(**batch, use_cache=False).logits
        with torch.inference_mode():
            model(**batch)
        with pytest.raises(ValueError, match="labels"):
            model(**batch, labels=ids)
        again = model(**batch, labels=labels)
    torch.testing.assert_close(last[:, -1], whole[:, -1])
    torch.testing.assert_close(quiet[:, -1], whole[:, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again.loss, out.loss)
    shifted = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(out.loss, shifted)
    tower = model.get_encoder(modality="image")
    assert any(w.grad is not None and bool(w.grad.abs().sum() > 0) for w in tower.parameters())


@families
@pytest.mark.parametrize("stages", [[Ragged()], [Inside(at=(1,)), Ragged(), Deep()]], ids=["tokens", "everywhere"])
def test_outputs_keep_fields_and_shapes(model, batch, stages):
    def shapes(out):
        return {k: shape(v) for k, v in out.items() if k != cache}

    def shape(value):
        if torch.is_tensor(value):
            return tuple(value.shape)
        return shapes(value) if hasattr(value, "items") else [shape(each) for each in value or ()]

    cache = "past_key_values"
    with torch.no_grad():
        want = model(**batch)
        with vtoken.wrapped(model, stages):
            got = model(**batch)
    assert list(got) == list(want) and shapes(got) == shapes(want)
    assert got[cache].get_seq_length() == want[cache].get_seq_length() == batch["input_ids"].shape[1]
    assert isinstance(got[cache], type(want[cache]))
    assert got[cache].layers[-1].keys.shape[2] < want[cache].layers[-1].keys.shape[2]


@every
def test_decoding_by_hand(model, pipeline):
    """Forward by forward, no position ids given: positions follow the prompt, rope_deltas included."""
    batch = tiny.build(model, [[3, "img", 5], [1, "img", 7]], seed=3)
    mask = batch.pop("attention_mask")
    p, tokens, logits = oracle.prompt(model, {**batch, "attention_mask": mask}), [], []
    with vtoken.wrapped(model, STAGES[pipeline]), torch.no_grad():
        out = model(**batch)
        stages = vtoken.trace(model).stages
        for _ in range(4):
            logits.append(out.logits[:, -1])
            tokens.append(logits[-1].argmax(-1))
            out = model(tokens[-1][:, None], past_key_values=out.past_key_values)
    compact = STAGES[pipeline].get("positions") == "compact"
    want = modes.forced(model, p, stages, torch.stack(tokens, 1), compact)
    torch.testing.assert_close(torch.stack(logits), want, atol=3e-4, rtol=1e-4)


@families
def test_scoring_an_answer_decides_as_generate_does(model):
    batch = tiny.build(model, modes.ROWS[:1], seed=3)
    with vtoken.wrapped(model, [Deep()]):
        out = greedy(model, batch, 4, return_dict_in_generate=True, output_logits=True)
        kept = vtoken.trace(model).kept
        ids = out.sequences[:, :-1]
        batch |= tiny.types(model, ids)
        batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        scored = model(**batch, logits_to_keep=4).logits
        assert torch.equal(vtoken.trace(model).kept[0], kept[0])
    torch.testing.assert_close(scored[0], torch.stack(out.logits)[:, 0], atol=1e-4, rtol=1e-4)


@every
def test_inputs_embeds(model, batch, pipeline):
    """Prompts given as embeddings: the placeholder's embedding marks the images, as upstream."""
    p = oracle.prompt(model, batch)
    given = {k: v for k, v in batch.items() if k not in ("input_ids", "mm_token_type_ids")}
    given["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
    with vtoken.wrapped(model, STAGES[pipeline]):
        want = model(**batch).logits
        if modes.mrope(model):
            model.model.rope_deltas = None
            with pytest.raises(UnsupportedError, match="position_ids"):
                model(**given)
            # Qwen cannot tell rows and columns from embeddings, so it has to be told.
            given["position_ids"] = p.positions
        got = model(**given).logits
    torch.testing.assert_close(got, want)


# Since then generate() calls the feature function outside of the offloaded forward.
NEWLINE_ON_META = Version("5.18") <= modes.VERSION


@families
@pytest.mark.parametrize("before", [True, False], ids=["offload, wrap", "wrap, offload"])
def test_offloaded_modules(family, model, batch, before):
    if hasattr(model.model, "image_newline") and NEWLINE_ON_META:
        pytest.skip("transformers from 5.18 on: image_newline stays on meta under cpu_offload, wrapped or not")
    if not tiny.family(family).offloads:
        pytest.skip("it reads a tensor that stays on meta under cpu_offload, wrapped or not")
    with vtoken.wrapped(model, STAGES["deep"]):
        want = greedy(model, batch)
    if before:
        cpu_offload(model, execution_device="cpu")
    with vtoken.wrapped(model, STAGES["deep"]):
        if not before:
            cpu_offload(model, execution_device="cpu")
        assert torch.equal(greedy(model, batch), want)


@families
def test_dispatched_to_cpu_and_disk(family, model, batch, tmp_path):
    if not tiny.family(family).offloads:
        pytest.skip("its tower reads a weight that stays on meta when it is on disk, wrapped or not")
    with vtoken.wrapped(model, STAGES["deep"]):
        want = greedy(model, batch)
    names = {module: name for name, module in model.named_modules()}
    lm, tower = names[model.get_decoder()], names[tiny.adapter(model).tower]
    where = {"lm_head": "cpu"} | {n: "cpu" for n, _ in model.named_modules() if n.count(".") == 1 and n != lm}
    where |= {f"{lm}.{name}": "cpu" for name, _ in model.get_submodule(lm).named_children() if name != "layers"}
    where |= {f"{lm}.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)} | {tower: "disk"}
    where |= {name: "cpu" for name, _ in model.named_parameters() if name.count(".") == 1 and name != "lm_head.weight"}
    dispatch_model(model, where, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert all(w.is_meta for w in model.get_submodule(tower).parameters()), "on disk"
    with vtoken.wrapped(model, STAGES["deep"]):
        assert torch.equal(greedy(model, batch), want)


@families
def test_quantised_linears(model, batch):
    """Weights in int8: the facts are read off the outputs of the projections, whatever their weights are."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    kinds = {type(w.data).__name__ for w in model.parameters()}
    assert any("Int8" in kind or "Quantized" in kind for kind in kinds), kinds
    pipeline = {"stages": [{"fastervlm": {"keep": 5}}, Deep()]}
    p = oracle.prompt(model, batch)
    with vtoken.wrapped(model, pipeline), torch.no_grad():
        out = greedy(model, batch, 4, return_dict_in_generate=True, output_logits=True)
        stages = vtoken.trace(model).stages
    want = modes.forced(model, p, stages, out.sequences[:, -4:])
    torch.testing.assert_close(torch.stack(out.logits), want, atol=3e-4, rtol=1e-4)


@families
@pytest.mark.parametrize("stages", [["fastervlm"], ["inside"], ["tokens", "deep"]], ids=" ".join)
def test_gradient_checkpointing(model, batch, stages):
    """The backward pass runs the layers again: the same gradients, or a refusal where transformers would run the hooks
    again too."""
    known = {"fastervlm": {"fastervlm": {"keep": 5}}, "inside": Inside(at=(1,)), "tokens": Ragged(), "deep": Deep()}
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    found = []
    with vtoken.wrapped(model, [known[name] for name in stages]):
        model(**batch, labels=labels).loss.backward()
        found.append({n: w.grad for n, w in model.named_parameters() if w.grad is not None})
        model.zero_grad(set_to_none=True)
        model.gradient_checkpointing_enable()
        model.train()
        if modes.VERSION < Version("5.21") and stages != ["fastervlm"]:
            with pytest.raises(UnsupportedError, match="checkpointing"):
                model(**batch, labels=labels)
            return
        model(**batch, labels=labels).loss.backward()
        found.append({n: w.grad for n, w in model.named_parameters() if w.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


@modes.whole
@pytest.mark.parametrize("name", [n for n in registry.stages() if registry.stage(n).site == "cache" and n != "kvpress"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_cache_stage_refuses_gradient_checkpointing(family, name, reentrant):
    """Which runs layers without a cache; evaluated, the same model is served."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS[:1], seed=3)
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    with vtoken.wrapped(model, [stage(name, seed=2)]):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for use_cache in (None, True):
            model.train()
            with pytest.raises(
                UnsupportedError, match=f"stage {name} shrinks the KV cache, and gradient checkpointing"
            ):
                model(**batch, labels=labels, use_cache=use_cache).loss.backward()
        model.eval()
        assert model(**batch, labels=labels, use_cache=True).loss.isfinite()


@families
def test_padding_on_the_right(model, batch):
    """As training does: the loss of a batch padded on the right is that of the batch padded on the left."""
    real, losses = batch["attention_mask"].bool(), []
    with vtoken.wrapped(model, [Ragged(), {"uniform": {"keep": 3}}]), torch.no_grad():
        for order in (slice(None), torch.argsort(~real, dim=1, stable=True)):
            given = dict(batch)
            for name in ("input_ids", "attention_mask", tiny.family(model).types):
                if name in batch and torch.is_tensor(order):
                    given[name] = batch[name].gather(1, order)
            labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
            labels[labels == tiny.IMG] = -100
            labels[:, 1:][given["input_ids"][:, :-1] == tiny.IMG] = -100
            labels[given["attention_mask"].cumsum(1) == 1] = -100
            if not modes.mrope(model):
                given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
            losses.append(model(**given, labels=labels).loss)
    torch.testing.assert_close(*losses)


@families
def test_tuples(model, batch):
    with vtoken.wrapped(model, STAGES["deep"]), torch.no_grad():
        want = model(**batch)
        got = model(**batch, return_dict=False)
    assert isinstance(got, tuple) and torch.equal(got[0], want.logits)


@pytest.mark.parametrize("family", tiny.each("deepstack", window=None))
def test_compiled_prefill(model, batch):
    """torch.compile over the whole forward prunes as the model does without it."""
    torch._dynamo.reset()
    with vtoken.wrapped(model, [Inside(at=(1,)), Ragged(), Deep()]), torch.no_grad():
        want, kept = model(**batch).logits, vtoken.trace(model).kept
        got = torch.compile(model.forward, backend="eager")(**batch).logits
        assert all(torch.equal(a, b) for a, b in zip(vtoken.trace(model).kept, kept, strict=True))
    torch.testing.assert_close(got, want)


@families
def test_stages_read_the_prompt_not_the_answer(family, model):
    """Text that is scored behind the prompt (logits_to_keep) is no part of the question."""
    batch = tiny.build(model, [[3, "img", 5]], seed=3)
    seen = []
    with vtoken.wrapped(model, [Recorder(asks=(("text", None),), seen=seen)]), torch.no_grad():
        model(**batch)
        model(**batch, logits_to_keep=4)
    assert len(seen[0].fact("text")[0]) == len(seen[1].fact("text")[0]) + 3
