"""What a wrapped model leaves behind: nothing on the model, in its files, or in memory."""

from __future__ import annotations

import gc
import weakref
from functools import wraps
from itertools import product

import pytest
import tiny
import torch
import vispec_weights
from batches import inside
from modes import families, greedy, skip_refused
from probes import Deep, Inside, Ragged
from sparse_probes import Ladder

import vtoken
from vtoken import config, registry
from vtoken.errors import UnsupportedError
from vtoken.hooks.call.drafting import Drafting
from vtoken.hooks.vision.features import FeatureHooks
from vtoken.session import session_of

SITES = {
    "none": [],
    "encoder": [Inside(at=(1,))],
    "tokens": [{"fastervlm": {"keep": 5}}, Ragged()],
    "merged": [{"visionzip": {"keep": 5}}],
    "decoder": [Deep(at=(1, 2)), {"fastv": {"keep": 2, "layer": 3}}],
    "attention": [Ladder()],
    "unmerged": [{"pool": {"size": 2}}, "vtu"],
    "cache": [{"snapkv": {"keep": 2, "window": 2}}],
    "cache in bits": [{"zipvl_cache": {"tau": 0.9, "recent": 2, "drawn": 4}}],
}
sites = pytest.mark.parametrize("name", SITES)
ROWS = [[3, "img", 5], [1, "img", 4]]


@families
@sites
@pytest.mark.parametrize("unwrapped", [False, True])
def test_a_model_is_freed(family, name, unwrapped):
    """With its last reference the model goes, wrapped or not any more, after it has run."""
    skip_refused(tiny.family(family).stock, inside(family, SITES[name]))
    gc.freeze()  # What was there before need not be looked through.
    model = tiny.make(family)
    vtoken.wrap(model, inside(family, SITES[name]))
    greedy(model, tiny.build(model, ROWS, seed=3), 2)
    if unwrapped:
        vtoken.unwrap(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    gc.unfreeze()
    assert gone() is None


@families
@sites
def test_what_was_encoded_goes_with_the_call(family, name, monkeypatch):
    """Facts and features of a picture go when `generate`, or a forward, returns."""
    skip_refused(tiny.family(family).stock, inside(family, SITES[name]))
    model, made = tiny.make(family), []
    encode = FeatureHooks._encode

    def noted(self, call, out):
        found = encode(self, call, out)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(FeatureHooks, "_encode", noted)
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, inside(family, SITES[name])), torch.no_grad():
        for call in (lambda: greedy(model, batch, 2), lambda: model(**batch)):
            made.clear()
            call()
            assert bool(made) == bool(SITES[name]) and not [ref for ref in made if ref() is not None]


POLICIES = [
    dict(zip(config.POLICIES, chosen, strict=True))
    for chosen in product(*(values for values, _ in config.POLICIES.values()))
]


@families
def test_what_is_saved_is_the_checkpoints_own(family, tmp_path):
    """Byte for byte the files of the stock model, under every policy that the family can have."""
    model = tiny.make(family)
    model.save_pretrained(tmp_path / "stock")
    want = {file.name: file.read_bytes() for file in (tmp_path / "stock").iterdir()}
    served = 0
    for stages in ([], [{"fastervlm": {"keep": 5}}, Deep()]):
        for policies in POLICIES:
            try:
                vtoken.wrap(model, {**policies, "stages": stages})
            except UnsupportedError:
                continue
            model.save_pretrained(tmp_path / "wrapped")
            vtoken.unwrap(model)
            assert {file.name: file.read_bytes() for file in (tmp_path / "wrapped").iterdir()} == want, policies
            served += 1
    assert served >= 4


@pytest.mark.parametrize("family", tiny.families(anyres=True))
def test_the_crop_grid_of_a_pipeline_acts_and_goes(family):
    model = tiny.make(family)
    grid = model.config.image_grid_pinpoints
    with vtoken.wrapped(model, {"anyres": "2x2", "stages": []}):
        assert model.config.image_grid_pinpoints == grid, "the checkpoint's own"
        assert model.model.config.image_grid_pinpoints == [[112, 112]], "what cuts pictures"
    assert model.model.config is model.config


class Processor:
    """Of an anyres family, as far as match_processor looks."""

    def __init__(self, grid):
        self.image_processor = type("Images", (), {})()
        self.image_processor.image_grid_pinpoints = grid


def test_a_matched_processor_can_be_taken_back():
    model, own = tiny.make("llava_next"), [[56, 56]]
    processor = Processor(own)
    with vtoken.wrapped(model, {"anyres": "2x2", "stages": []}):
        vtoken.match_processor(processor, model)
        assert processor.image_processor.image_grid_pinpoints == [[112, 112]]
        vtoken.match_processor(processor, model)
    assert vtoken.unmatch_processor(processor) is processor
    assert processor.image_processor.image_grid_pinpoints == own
    with pytest.raises(UnsupportedError, match="not matched"):
        vtoken.unmatch_processor(processor)
    for half in (processor.image_processor, None):
        with pytest.raises(UnsupportedError, match="does not have crop grids"):
            vtoken.match_processor(half, model)
        with pytest.raises(UnsupportedError, match="not matched"):
            vtoken.unmatch_processor(half)


def test_every_undo_runs():
    """Some fail: all others are done, what failed is told together, and the model can be wrapped again."""
    model = tiny.llava()
    vtoken.wrap(model, SITES["decoder"])
    session = session_of(model)
    for message in ("one", "two"):
        session.context.handle._undo.insert(3, lambda message=message: (_ for _ in ()).throw(RuntimeError(message)))
    with pytest.raises(ExceptionGroup) as error:
        vtoken.unwrap(model)
    assert [str(e) for e in error.value.exceptions] == ["two", "one"] or len(error.value.exceptions) == 2
    assert not any(
        m._forward_pre_hooks or m._forward_hooks for m in model.modules() if m is not model.model.vision_tower
    )
    vtoken.unwrap(vtoken.wrap(model, SITES["decoder"]))


@families
def test_patches_made_after_wrap_stay(family):
    """What somebody else put over an attribute since is not taken off with ours, and goes on working."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    want = greedy(model, batch)
    vtoken.wrap(model, {"min_visual_tokens": 1, "stages": [{"fastervlm": {"keep": 5}}, Deep()]})
    ours, patched = model.model.get_image_features, []

    @wraps(ours)
    def patch(*args, **kwargs):
        patched.append(1)
        return ours(*args, **kwargs)

    model.model.get_image_features = patch
    vtoken.unwrap(model)
    assert model.model.get_image_features is patch
    assert torch.equal(greedy(model, batch), want) and patched


STORED = [name for name in registry.stages() if name in ("dyvte", "dpn_routed", "seerattention")]


@pytest.mark.parametrize("name", STORED)
def test_unwrap_frees_what_stages_brought_to_devices(name):
    from usual import stage

    model, tested = tiny.llava(), stage(name, seed=18)
    vtoken.wrap(model, [tested])
    greedy(model, tiny.build(model, [[3, "img", 5]], seed=3), 1)
    assert tested.weights._there, "something was brought"
    vtoken.unwrap(model)
    assert not tested.weights._there


@pytest.mark.parametrize("family", tiny.families(anyres=True))
def test_layouts_of_picture_sizes_are_bounded(family):
    model = tiny.make(family)
    adapter = registry.adapter(family)(model)
    for side in range(40, 240):
        size = torch.tensor([[side, 60]])
        crops = adapter.crops({"image_sizes": size})
        adapter.layouts("image", {"pixel_values": torch.zeros(1, crops[0], 3, 56, 56), "image_sizes": size})
    assert 0 < adapter._layout.cache_info().currsize <= 64


@families
def test_only_facts_that_somebody_reads_are_packed(family, monkeypatch):
    """A stage inside the tower needs none of its facts behind it."""
    model, packed = tiny.make(family), []
    vtoken.wrap(model, [{"flowcut": {"keep": 6}}])
    adapter = session_of(model).adapter
    pack = adapter.pack
    monkeypatch.setattr(adapter, "pack", lambda call, values: packed.append(values.shape) or pack(call, values))
    greedy(model, tiny.build(model, [[3, "img", 5]], seed=3), 1)
    assert len(packed) <= 2, "which tokens are left, and what they are called in the trace"


def failing(model):
    """Has one change that the model's session made fail to be undone."""
    session_of(model).context.handle._undo.insert(0, lambda: 1 // 0)


def test_what_fails_at_one_model_does_not_keep_the_other():
    """Of a contrast and of a draft, the other model is released as well."""
    model, other = tiny.llava(), tiny.llava(seed=1)
    vtoken.wrap(model, {"stages": [], "contrast": {"stages": ["pool"]}})
    failing(session_of(model).against.adapter.model)
    with pytest.raises(ExceptionGroup):
        vtoken.unwrap(model)
    assert session_of(model) is None
    vtoken.wrap(model, SITES["decoder"])
    for broken in (model, other):
        draft = vtoken.draft(model, other, "specvlm:3")
        failing(broken)
        with pytest.raises(ExceptionGroup):
            vtoken.unwrap(draft)
        assert session_of(other) is None and vtoken.pipeline(model).stages[0] == SITES["decoder"][0]
    vtoken.unwrap(model)


@pytest.mark.parametrize("trained", [True, False])
def test_a_pair_that_cannot_be_made_leaves_the_target_as_it_was(trained, tmp_path, monkeypatch):
    model, other = tiny.llava(), tiny.llava(seed=1)
    vtoken.wrap(model, SITES["decoder"])
    before = vtoken.pipeline(model)
    draft = vispec_weights.written(vispec_weights.random(model), tmp_path) if trained else other
    monkeypatch.setattr(Drafting, "on_target", lambda self, context: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        vtoken.draft(model, draft)
    assert vtoken.pipeline(model) is before and session_of(model).pair is None and session_of(other) is None
