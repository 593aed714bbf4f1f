"""Every way of calling a model: beams, sampling, streaming, static cache, assistants, turns, training, threads."""

from __future__ import annotations

import copy
import threading

import oracle
import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from probes import Deep, Ragged
from transformers import TextStreamer

import vtoken
from vtoken.errors import UnsupportedError

ROWS = [[3, "img", 5], [1, "img", 2, "img", 7], [4]]
# Up to 5.17 transformers itself mixes up the images of a row that holds several, once beams or return sequences expand the batch.
NEW_TRANSFORMERS = Version(transformers.__version__) >= Version("5.18")
EXPANDABLE = ROWS if NEW_TRANSFORMERS else [[3, "img", 5], [1, "img", 7], [4]]
STAGES = {
    "tokens": {"stages": [{"fastervlm": {"keep": 5}}, Ragged()]},
    "compact": {"positions": "compact", "stages": [{"fastervlm": {"keep": 5}}, Ragged()]},
    "deep": {"stages": [Ragged(), Deep()]},
}
every = pytest.mark.parametrize("pipeline", STAGES.values(), ids=STAGES)


@pytest.fixture
def model():
    return tiny.llava()


@pytest.fixture
def batch(model):
    return tiny.build(model, ROWS, seed=3)


def greedy(model, batch, n=8, **options):
    return model.generate(**batch, max_new_tokens=n, do_sample=False, **options)


def teacher(model, p, trace, sequences, compact, n):
    """Log-probabilities that the oracle gives to the generated tokens."""
    entry = [s for s in trace.stages if s.site != "decoder"]
    keep = oracle.keep_mask(p, entry[-1].kept, tiny.TOKENS)
    inner = {s.layer: oracle.keep_mask(p, s.kept, tiny.TOKENS) for s in trace.stages if s.site == "decoder"}
    start = sequences[:, -n:]
    _, logits = oracle.generate(model, p, keep, n, compact, inner, start=start.tolist())
    return logits.log_softmax(-1).gather(2, start.T[..., None])[..., 0].sum(0)


@every
def test_batch_equals_single(model, batch, pipeline):
    with vtoken.wrapped(model, pipeline):
        together, kept = greedy(model, batch), vtoken.trace(model).kept
        alone, images = [], []
        for r, row in enumerate(ROWS):
            real = batch["attention_mask"][r].bool()
            one = {
                "input_ids": batch["input_ids"][r, real][None],
                "attention_mask": batch["attention_mask"][r, real][None],
            }
            n = sum(item == "img" for item in row)
            if n:
                first = sum(item == "img" for earlier in ROWS[:r] for item in earlier)
                one["pixel_values"] = batch["pixel_values"][first : first + n]
            alone.append(greedy(model, one)[:, -8:])
            images += vtoken.trace(model).kept if n else []
    assert torch.equal(together[:, -8:], torch.cat(alone))
    assert all(torch.equal(a, b) for a, b in zip(kept, images, strict=True))


@every
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams(model, pipeline, options):
    """The score of every returned beam is what teacher forcing through the oracle gives it."""
    n, copies = 5, options.get("num_return_sequences", 1)
    batch = tiny.build(model, EXPANDABLE, seed=3)
    p = oracle.prompt(model, batch)
    with vtoken.wrapped(model, pipeline):
        greedy(model, batch, 1)
        trace = vtoken.trace(model)
        out = greedy(model, batch, n, return_dict_in_generate=True, output_scores=True, length_penalty=0.0, **options)
        wide = vtoken.trace(model)
    second = list(range(1, len(batch["pixel_values"])))
    images = [0] * options["num_beams"] + second * options["num_beams"]
    assert all(torch.equal(wide.kept[j], trace.kept[i]) for j, i in enumerate(images))
    for b in range(copies):
        score = teacher(model, p, trace, out.sequences[b::copies], pipeline.get("positions") == "compact", n)
        torch.testing.assert_close(out.sequences_scores[b::copies], score, atol=1e-3, rtol=1e-3)


@every
def test_sampling_and_return_sequences(model, pipeline):
    batch = tiny.build(model, EXPANDABLE, seed=3)
    n, p = 4, oracle.prompt(model, batch)
    with vtoken.wrapped(model, pipeline):
        greedy(model, batch, 1)
        trace = vtoken.trace(model)
        torch.manual_seed(5)
        options = {"do_sample": True, "num_return_sequences": 2, "top_k": 0, "return_dict_in_generate": True}
        out = model.generate(**batch, max_new_tokens=n, output_logits=True, **options)
    scores = torch.stack(out.logits).log_softmax(-1).gather(2, out.sequences[:, -n:].T[..., None])[..., 0].sum(0)
    for b in range(2):
        score = teacher(model, p, trace, out.sequences[b::2], pipeline.get("positions") == "compact", n)
        torch.testing.assert_close(scores[b::2], score, atol=1e-3, rtol=1e-3)


@every
def test_without_cache(model, batch, pipeline):
    # A stage that looks at the last token decides anew at every step without a cache: then only the first step is the same.
    n = 1 if any(isinstance(stage, Deep) for stage in pipeline["stages"]) else 8
    with vtoken.wrapped(model, pipeline):
        assert torch.equal(greedy(model, batch, n, use_cache=False), greedy(model, batch, n))


@every
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_static_cache(pipeline, attn):
    model = tiny.llava(attn)
    for rows in (ROWS, ROWS[:1]):
        batch = tiny.build(model, rows, seed=3)
        with vtoken.wrapped(model, pipeline):
            assert torch.equal(greedy(model, batch, cache_implementation="static"), greedy(model, batch))


@every
def test_streaming(model, pipeline):
    batch = tiny.build(model, ROWS[:1], seed=3)
    seen: list[int] = []

    class Stream(TextStreamer):
        def __init__(self):
            pass

        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            pass

    with vtoken.wrapped(model, pipeline):
        out = greedy(model, batch, streamer=Stream())
    assert seen[-8:] == out[0, -8:].tolist()


@every
def test_assisted_generation(model, pipeline):
    """Greedy assisted decoding gives the greedy answer, whether the drafts are good, bad, pruned or looked up."""
    batch = tiny.build(model, ROWS[:1], seed=5)
    batch.pop("attention_mask")
    with vtoken.wrapped(model, pipeline):
        plain = greedy(model, batch)
        assert torch.equal(greedy(model, batch, prompt_lookup_num_tokens=3), plain)
        assert torch.equal(greedy(model, batch, assistant_model=tiny.llava()), plain)
        other = vtoken.wrap(tiny.llava(seed=1), pipeline)
        assert torch.equal(greedy(model, batch, assistant_model=other), plain)


@every
@pytest.mark.parametrize("image", [False, True])
def test_second_turn(model, pipeline, image):
    """A turn on the returned cache equals the oracle over the kept tokens of both turns; only new tokens are fed."""
    n, compact = 4, pipeline.get("positions") == "compact"
    first = tiny.build(model, ROWS[:2], seed=3)
    turn = tiny.build(model, [[3, "img", 2], [3, "img", 2]] if image else [[5], [5]], seed=9)
    fed = []
    with vtoken.wrapped(model, pipeline):
        a = greedy(model, first, n, return_dict_in_generate=True)
        kept = [s for s in vtoken.trace(model).stages]
        ids = torch.cat([a.sequences, turn["input_ids"]], 1)
        mask = torch.cat([first["attention_mask"], torch.ones_like(ids[:, first["attention_mask"].shape[1] :])], 1)
        more = {"pixel_values": turn["pixel_values"]} if image else {}
        hook = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda m, a, k: fed.append(a[0].shape[1]), with_kwargs=True
        )
        b = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=a.past_key_values,
            max_new_tokens=n,
            do_sample=False,
            **more,
        )
        hook.remove()
        if image:
            later = vtoken.trace(model).stages
    # The last generated token was never cached, so it is fed with the turn.
    assert fed[0] <= turn["input_ids"].shape[1] + 1
    whole = {"input_ids": ids, "attention_mask": mask, "pixel_values": first["pixel_values"]}
    order = [0, 1, 2]
    if image:
        whole["pixel_values"] = torch.cat([first["pixel_values"], turn["pixel_values"]])[[0, 3, 1, 2, 4]]
        order = [0, 3, 1, 2, 4]
    p = oracle.prompt(model, whole)
    entry, inner = {}, {}
    for s, t in zip(kept, later if image else kept, strict=True):
        both = [(s.kept + (t.kept if image else []))[i] for i in order]
        (inner if s.site == "decoder" else entry)[s.layer] = oracle.keep_mask(p, both, tiny.TOKENS)
    tokens, _ = oracle.generate(model, p, list(entry.values())[-1], n, compact, inner)
    assert torch.equal(b[:, -n:], tokens)


@every
def test_forward_keeps_the_contract(model, batch, pipeline):
    """Logits keep the prompt's shape; labels on text give the loss of the kept positions; logits_to_keep works; gradients flow."""
    labels = (
        batch["input_ids"]
        .masked_fill(batch["input_ids"] == tiny.IMG, -100)
        .masked_fill(batch["attention_mask"] == 0, -100)
    )
    labels[:, 1:][batch["input_ids"][:, :-1] == tiny.IMG] = -100
    with vtoken.wrapped(model, pipeline):
        out = model(**batch, labels=labels)
        assert out.logits.shape[:2] == batch["input_ids"].shape
        out.loss.backward()
        last = model(**batch, logits_to_keep=1).logits
        quiet = model(**batch, use_cache=False).logits
        with torch.inference_mode():
            model(**batch)
        with pytest.raises(ValueError, match="labels"):
            model(**batch, labels=batch["input_ids"])
        again = model(**batch, labels=labels)
    torch.testing.assert_close(last[:, -1], out.logits[:, -1])
    torch.testing.assert_close(quiet[:, -1], out.logits[:, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again.loss, out.loss)
    shifted = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(out.loss, shifted)
    tower = model.model.vision_tower
    assert any(w.grad is not None and bool(w.grad.abs().sum() > 0) for w in tower.parameters())


def test_scoring_an_answer_decides_as_generate_does(model):
    batch = tiny.build(model, ROWS[:1], seed=3)
    with vtoken.wrapped(model, [Deep()]):
        out = greedy(model, batch, 4, return_dict_in_generate=True, output_logits=True)
        kept = vtoken.trace(model).kept
        ids = out.sequences[:, :-1]
        scored = model(
            ids, attention_mask=torch.ones_like(ids), pixel_values=batch["pixel_values"], logits_to_keep=4
        ).logits
        assert torch.equal(vtoken.trace(model).kept[0], kept[0])
    torch.testing.assert_close(scored[0], torch.stack(out.logits)[:, 0], atol=1e-4, rtol=1e-4)


@every
def test_text_only_calls_are_untouched(model, pipeline):
    text = tiny.build(model, [[6], [4]], seed=1)
    plain = greedy(model, text)
    with vtoken.wrapped(model, pipeline):
        assert torch.equal(greedy(model, text), plain)
        assert vtoken.trace(model).visual_tokens == []


@every
def test_inputs_embeds(model, batch, pipeline):
    """Prompts given as embeddings: the placeholder's embedding marks the images, as upstream."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with vtoken.wrapped(model, pipeline):
        want = model(**batch).logits
        got = model(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"], pixel_values=batch["pixel_values"]
        ).logits
    torch.testing.assert_close(got, want)


@every
def test_bfloat16(model, batch, pipeline):
    model = model.to(torch.bfloat16)
    with vtoken.wrapped(model, pipeline), torch.inference_mode():
        out = greedy(model, {**batch, "pixel_values": batch["pixel_values"].bfloat16()})
    assert out.shape[1] == batch["input_ids"].shape[1] + 8


@every
def test_offloaded_modules(model, batch, pipeline):
    from accelerate import cpu_offload

    with vtoken.wrapped(model, pipeline):
        plain = greedy(model, batch)
        cpu_offload(model, execution_device="cpu")
        assert torch.equal(greedy(model, batch), plain)


@every
def test_threads_share_nothing(model, pipeline):
    batches = [tiny.build(model, [[3, "img", n + 1], [2, "img", 1]], seed=n) for n in range(4)]
    other = tiny.llava(seed=1)
    with vtoken.wrapped(model, pipeline), vtoken.wrapped(other, [{"random": {"keep": 3}}]):
        want = [greedy(model, b) for b in batches]
        wanted = [greedy(other, b) for b in batches]
        got: dict = {}

        def work(i):
            got[i] = [(greedy(model, batches[i]), greedy(other, batches[i])) for _ in range(3)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert all(torch.equal(a, want[i]) and torch.equal(b, wanted[i]) for i in range(4) for a, b in got[i])


def test_what_cannot_hold_is_refused(model, batch):
    with vtoken.wrapped(model, "fastervlm:4"):
        with pytest.raises(UnsupportedError, match="4D"):
            length = batch["input_ids"].shape[1]
            mask = torch.ones(3, 1, length, length, dtype=torch.bool).tril()
            model(**{**batch, "attention_mask": mask}, use_cache=False)
        # Older transformers leaves the images out of a chunked prefill, wrapped or not.
        if NEW_TRANSFORMERS:
            with pytest.raises(ValueError, match="prefill_chunk_size"):
                greedy(model, tiny.build(model, [[3, "img", 5]], seed=1), prefill_chunk_size=8)
        with pytest.raises(UnsupportedError, match="vision_feature_layer"):
            model(**batch, vision_feature_layer=-1)
        with pytest.raises(TypeError, match="unwrap"):
            copy.deepcopy(model)
        old = model.get_image_features(batch["pixel_values"], return_dict=True)
        model.get_image_features(batch["pixel_values"] + 1, return_dict=True)
        text = {k: v for k, v in batch.items() if k != "pixel_values"}
        if "mm_encoder_outputs" in model.forward.__annotations__:
            with pytest.raises(ValueError, match="encoded last"):
                model(**text, mm_encoder_outputs={"image": old})
        # After every refusal the model still works.
        assert greedy(model, batch).shape[0] == 3


def test_a_pruned_cache_ends_with_its_wrap(model, batch):
    with vtoken.wrapped(model, "fastervlm:4"):
        out = greedy(model, batch, 3, return_dict_in_generate=True)
    ids = torch.cat([out.sequences, out.sequences[:, -2:]], 1)
    with pytest.raises(RuntimeError, match="unwrapped"):
        model.generate(input_ids=ids, past_key_values=copy.deepcopy(out.past_key_values), max_new_tokens=1)
    with vtoken.wrapped(model, "fastervlm:4"), pytest.raises(RuntimeError, match="another wrap"):
        model.generate(input_ids=ids, past_key_values=out.past_key_values, max_new_tokens=1)


@pytest.mark.parametrize("stages", [[Ragged()], [Ragged(), Deep()]], ids=["tokens", "deep"])
def test_compiled_decoding_is_one_graph(model, batch, stages):
    """generate's own compiled decode on a static cache: same tokens, one graph, nothing that breaks it."""
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    compiling = CompileConfig(backend="eager", mode=None, fullgraph=False, dynamic=False)
    compiling._compile_all_devices = True
    with vtoken.wrapped(model, stages):
        want = greedy(model, batch)
        torch._dynamo.reset()
        counters.clear()
        got = greedy(model, batch, cache_implementation="static", compile_config=compiling)
    assert torch.equal(got, want)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_compact_layer_groups_need_a_dynamic_cache(model, batch):
    with vtoken.wrapped(model, {"positions": "compact", "stages": [Ragged(), Deep()]}):
        want = greedy(model, batch)
        with pytest.raises(UnsupportedError, match="dynamic cache"):
            greedy(model, batch, cache_implementation="static")
        assert torch.equal(greedy(model, batch), want)
