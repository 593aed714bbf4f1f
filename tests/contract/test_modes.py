"""Every way of generating, on every family: batches, beams, sampling, streaming, caches, assistants, threads."""

from __future__ import annotations

import copy
import threading

import modes
import oracle
import pytest
import tiny
import torch
from batches import suited
from modes import STAGES, every, families, greedy
from packaging.version import Version
from probes import Deep, Ragged
from transformers import TextStreamer

import vtoken
from vtoken.errors import UnsupportedError


@pytest.fixture
def model(family):
    return tiny.make(family)


@pytest.fixture
def batch(model):
    return tiny.build(model, modes.ROWS, seed=3)


def compact(pipeline):
    return STAGES[pipeline].get("positions") == "compact"


def score(model, p, stages, sequences, n, compact):
    """Log-probabilities [B] that the oracle gives to the generated tokens."""
    tokens = sequences[:, -n:]
    logits = modes.forced(model, p, stages, tokens, compact)
    return logits.log_softmax(-1).gather(2, tokens.T[..., None])[..., 0].sum(0)


@every
def test_batch_equals_single(model, batch, pipeline):
    with vtoken.wrapped(model, STAGES[pipeline]):
        together, kept = greedy(model, batch), vtoken.trace(model).kept
        alone, images = [], []
        for row in range(len(batch["input_ids"])):
            alone.append(greedy(model, modes.alone(model, batch, row))[:, -6:])
            images += vtoken.trace(model).kept
    assert torch.equal(together[:, -6:], torch.cat(alone))
    assert len(images) == 3
    assert all(torch.equal(a, b) for a, b in zip(kept, images, strict=True))


def check_beams(model, rows, pipeline, options, n=4):
    """The score of every returned beam is what teacher forcing through the oracle gives it."""
    copies, width = options.get("num_return_sequences", 1), options["num_beams"]
    batch = tiny.build(model, rows, seed=3)
    p = oracle.prompt(model, batch)
    with vtoken.wrapped(model, STAGES[pipeline]):
        greedy(model, batch, 1)
        trace = vtoken.trace(model)
        out = greedy(model, batch, n, return_dict_in_generate=True, output_scores=True, length_penalty=0.0, **options)
        wide = vtoken.trace(model)
    images = [i for r in range(len(rows)) for _ in range(width) for i, at in enumerate(trace.row) if at == r]
    assert all(torch.equal(k, trace.kept[i]) for k, i in zip(wide.kept, images, strict=True))
    for b in range(copies):
        want = score(model, p, trace.stages, out.sequences[b::copies], n, compact(pipeline))
        torch.testing.assert_close(out.sequences_scores[b::copies], want, atol=1e-3, rtol=1e-3)


@every
def test_beams(family, model, pipeline):
    check_beams(model, modes.expandable(family), pipeline, {"num_beams": 3})


@every
def test_beams_with_return_sequences(family, model, pipeline):
    check_beams(model, modes.expandable(family), pipeline, {"num_beams": 4, "num_return_sequences": 2})


@pytest.mark.parametrize("family", tiny.VIDEO)
@pytest.mark.parametrize("pipeline", ["tokens", "deep"])
def test_videos_under_beams_and_static_cache(family, model, pipeline):
    rows = suited(family, modes.VIDEOS)
    if tiny.family(family).video_beams:
        check_beams(model, rows, pipeline, {"num_beams": 2})
    batch = tiny.build(model, rows, seed=3)
    with vtoken.wrapped(model, STAGES[pipeline]):
        assert torch.equal(greedy(model, batch, cache_implementation="static"), greedy(model, batch))


@every
def test_sampling_and_return_sequences(family, model, pipeline):
    batch = tiny.build(model, modes.expandable(family), seed=3)
    n, p = 4, oracle.prompt(model, batch)
    with vtoken.wrapped(model, STAGES[pipeline]):
        greedy(model, batch, 1)
        trace = vtoken.trace(model)
        torch.manual_seed(5)
        options = {"do_sample": True, "num_return_sequences": 2, "top_k": 0, "return_dict_in_generate": True}
        out = model.generate(**batch, max_new_tokens=n, output_logits=True, **options)
    got = torch.stack(out.logits).log_softmax(-1).gather(2, out.sequences[:, -n:].T[..., None])[..., 0].sum(0)
    for b in range(2):
        want = score(model, p, trace.stages, out.sequences[b::2], n, compact(pipeline))
        torch.testing.assert_close(got[b::2], want, atol=1e-3, rtol=1e-3)


@every
def test_without_cache(model, batch, pipeline):
    # A stage that looks at the last token decides anew at every step without a cache: then only the first step is the
    # same.
    n = 1 if pipeline == "deep" else 6
    with vtoken.wrapped(model, STAGES[pipeline]):
        assert torch.equal(greedy(model, batch, n, use_cache=False), greedy(model, batch, n))


@every
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_static_cache(family, pipeline, attn):
    model = tiny.make(family, attn)
    for rows in (modes.ROWS, modes.ROWS[:1]):
        batch = tiny.build(model, rows, seed=3)
        with vtoken.wrapped(model, STAGES[pipeline]):
            assert torch.equal(greedy(model, batch, cache_implementation="static"), greedy(model, batch))


@families
def test_streaming(model):
    batch = tiny.build(model, modes.ROWS[:1], seed=3)
    seen: list[int] = []

    class Stream(TextStreamer):
        def __init__(self):
            pass

        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            pass

    with vtoken.wrapped(model, STAGES["deep"]):
        out = greedy(model, batch, streamer=Stream())
    assert seen[-6:] == out[0, -6:].tolist()


@every
def test_assisted_generation(family, model, pipeline):
    """Greedy assisted decoding gives the greedy answer, whether the drafts are good, bad, pruned or looked up. Where no
    token can be taken back from a state transformers refuses."""
    batch = tiny.build(model, modes.ROWS[:1], seed=5)
    batch.pop("attention_mask")
    if model._is_stateful:
        with vtoken.wrapped(model, STAGES[pipeline]), pytest.raises(ValueError, match="stateful"):
            greedy(model, batch, prompt_lookup_num_tokens=3)
        return
    with vtoken.wrapped(model, STAGES[pipeline]):
        plain = greedy(model, batch)
        assert torch.equal(greedy(model, batch, prompt_lookup_num_tokens=3), plain)
        assert torch.equal(greedy(model, batch, assistant_model=tiny.make(family)), plain)
        other = vtoken.wrap(tiny.make(family, seed=1), STAGES[pipeline])
        assert torch.equal(greedy(model, batch, assistant_model=other), plain)


@every
def test_bfloat16(family, batch, pipeline):
    model = tiny.make(family, **tiny.family(family).steady).to(torch.bfloat16)
    batch |= {k: v.bfloat16() for k, v in batch.items() if k.startswith("pixel_values")}
    p = oracle.prompt(model, batch)
    with vtoken.wrapped(model, STAGES[pipeline]), torch.inference_mode():
        out = greedy(model, batch, 4, return_dict_in_generate=True, output_logits=True)
        stages = vtoken.trace(model).stages
    want = modes.forced(model, p, stages, out.sequences[:, -4:], compact(pipeline))
    assert out.past_key_values.layers[-1].keys.dtype == torch.bfloat16
    error = (torch.stack(out.logits).float() - want.float()).abs().max() / want.float().abs().max()
    assert error < 0.05, error


@families
def test_text_only_calls_are_untouched(model):
    text = tiny.build(model, [[6], [4]], seed=1)
    plain = greedy(model, text)
    with vtoken.wrapped(model, STAGES["deep"]):
        assert torch.equal(greedy(model, text), plain)
        assert vtoken.trace(model).visual_tokens == []


@families
def test_threads_share_nothing(family, model):
    """Qwen keeps `rope_deltas` on the model, so its own threads disturb each other there; every thread has one picture
    size."""
    rows = [[3, "img", 4], [2, "img", 5]]
    batches = [tiny.build(model, rows, seed=n) for n in range(4)]
    other = tiny.make(family, seed=1)
    with vtoken.wrapped(model, STAGES["deep"]), vtoken.wrapped(other, [{"random": {"keep": 3}}]):
        want = [greedy(model, b) for b in batches]
        wanted = [greedy(other, b) for b in batches]
        got: dict = {}

        def work(i):
            got[i] = [(greedy(model, batches[i]), greedy(other, batches[i])) for _ in range(2)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert all(torch.equal(a, want[i]) and torch.equal(b, wanted[i]) for i in range(4) for a, b in got[i])


@families
def test_what_cannot_hold_is_refused(model, batch):
    with vtoken.wrapped(model, [{"random": {"keep": 3}}]):
        with pytest.raises(UnsupportedError, match="4D"):
            length = batch["input_ids"].shape[1]
            mask = torch.ones(3, 1, length, length, dtype=torch.bool).tril()
            positions = torch.arange(length).expand(3, -1)
            model(**{**batch, "attention_mask": mask}, use_cache=False, position_ids=positions)
        # Older transformers leaves the images out of a chunked prefill, wrapped or not.
        if Version("5.18") <= modes.VERSION:
            with pytest.raises(ValueError, match="prefill_chunk_size"):
                greedy(model, tiny.build(model, [[3, "img", 5]], seed=1), prefill_chunk_size=8)
        with pytest.raises(TypeError, match="unwrap"):
            copy.deepcopy(model)
        # After every refusal the model still works.
        assert greedy(model, batch).shape[0] == 3


@families
def test_features_of_another_picture_are_refused(model):
    batch = tiny.build(model, modes.ROWS[:1], seed=3)
    given = {k: batch.pop(k) for k in modes.INPUTS["image"] if k in batch}
    if "mm_encoder_outputs" not in model.forward.__annotations__:
        pytest.skip("transformers takes encoded features from 5.18 on")
    with vtoken.wrapped(model, [{"random": {"keep": 3}}]):
        old = model.model.get_image_features(**given, return_dict=True)
        model.model.get_image_features(**{**given, "pixel_values": given["pixel_values"] + 1}, return_dict=True)
        kept = {k: v for k, v in given.items() if "grid" in k}
        with pytest.raises(ValueError, match="encoded last"):
            model(**batch, **kept, mm_encoder_outputs={"image": old})


@pytest.mark.parametrize("asked", [-1, [-1], (-1,)], ids=str)
def test_another_layer_of_the_tower_is_refused(asked):
    model = tiny.llava()
    with vtoken.wrapped(model, "fastervlm:4"), pytest.raises(UnsupportedError, match="vision_feature_layer"):
        model(**tiny.build(model, modes.ROWS, seed=3), vision_feature_layer=asked)


@families
def test_a_pruned_cache_ends_with_its_wrap(model, batch):
    with vtoken.wrapped(model, [Ragged()]):
        out = greedy(model, batch, 3, return_dict_in_generate=True)
    ids = torch.cat([out.sequences, out.sequences[:, -2:]], 1)
    with pytest.raises(RuntimeError, match="unwrapped"):
        model.generate(input_ids=ids, past_key_values=copy.deepcopy(out.past_key_values), max_new_tokens=1)
    with vtoken.wrapped(model, [Ragged()]), pytest.raises(RuntimeError, match="another wrap"):
        model.generate(input_ids=ids, past_key_values=out.past_key_values, max_new_tokens=1)


@pytest.mark.parametrize("family, pipeline", [*((f, "deep") for f in tiny.FAMILIES), ("llava", "tokens")])
def test_compiled_decoding_is_one_graph(model, batch, pipeline):
    """generate's own compiled decode on a static cache: same tokens, one graph, nothing that breaks it."""
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    compiling = CompileConfig(backend="eager", mode=None, fullgraph=False, dynamic=False)
    compiling._compile_all_devices = True
    with vtoken.wrapped(model, STAGES[pipeline]):
        want = greedy(model, batch)
        torch._dynamo.reset()
        counters.clear()
        got = greedy(model, batch, cache_implementation="static", compile_config=compiling)
    assert torch.equal(got, want)
    # Static layers with a window count their tokens in Python, of the stock model too: a graph for every step.
    graphs = 1 if tiny.family(model).window is None else got.shape[1] - batch["input_ids"].shape[1] - 1
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


@pytest.mark.parametrize("family", modes.COMPACT)
def test_compact_layer_groups_need_a_dynamic_cache(model, batch):
    with vtoken.wrapped(model, {"positions": "compact", "stages": [Ragged(), Deep()]}):
        want = greedy(model, batch)
        with pytest.raises(UnsupportedError, match="dynamic cache"):
            greedy(model, batch, cache_implementation="static")
        assert torch.equal(greedy(model, batch), want)
