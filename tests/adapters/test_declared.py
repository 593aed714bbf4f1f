"""What tests are told of a family is what its adapter finds on a model, and what the model itself does."""

from __future__ import annotations

import pytest
import tiny

from vtoken import registry
from vtoken.errors import UnsupportedError

families = pytest.mark.parametrize("family", tiny.FAMILIES)


def test_every_adapter_has_a_tiny_model() -> None:
    assert list(tiny.FAMILIES) == registry.adapters()


@families
def test_traits_are_the_adapters(family: str) -> None:
    one, adapter = tiny.family(family), tiny.adapter(tiny.make(family))
    assert (one.unit, one.full_attention) == (adapter.encoder.unit, adapter.encoder.full_attention)
    assert one.deepstack == len(adapter.projectors) - 1
    assert one.takes_video == ("video" in adapter.features)
    assert one.anyres == hasattr(adapter.model.config, "image_grid_pinpoints")


@families
def test_a_part_of_a_picture_is_none(family: str) -> None:
    """Of features that were encoded before, in a prompt that is prefilled in chunks."""
    with pytest.raises((ValueError, UnsupportedError), match=r"prefill_chunk_size=None|pass pixel_values"):
        tiny.adapter(tiny.make(family)).split(3)


@families
def test_pictures_are_as_they_are_called(family: str) -> None:
    """Images of other sizes, crops in company, and frames."""
    one, model = tiny.family(family), tiny.make(family)

    def layouts(*items: object) -> tuple:
        batch = tiny.build(model, [[each for item in items for each in (item, 1)]])
        kind = "video" if "pixel_values_videos" in batch else "image"
        return tiny.adapter(model).layouts(kind, batch)

    (alone,) = layouts("img")
    assert (one.anyres or (one.split and one.image != (0, 0))) == (len(alone.parts) > 1)
    if one.other != one.image:
        (other,) = layouts(("img", one.other))
        assert other.parts != alone.parts
    if one.anyres:
        assert one.crops_one_only == (layouts("img", "img")[0].parts != alone.parts)
    if one.takes_video:
        (video,) = layouts(("video", 4))
        assert video.interpolated == one.pooled_videos and video.parts[0][0] == one.frames((4, *one.video[1:]))[0] == 4


@families
def test_a_family_leads_by_its_own_word(family: str) -> None:
    """Not because its tiny model derives from one that does: `make test` would take too long."""
    one = tiny.family(family)
    assert one.leading == vars(type(one)).get("leading", False)
