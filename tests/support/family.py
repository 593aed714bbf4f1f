"""What tests know of a family beside its adapter: a tiny model, its pictures and prompts, and how it differs from
others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
import transformers
from tiny_models import IMG, TEXT, TOKENS, VID, VISION_END, finish
from torch import Tensor
from transformers import PreTrainedModel

from vtoken import registry
from vtoken.serving import family as serving

Spec = tuple[int, ...]
Draw = Callable[..., Tensor]


class Picture(NamedTuple):
    """An image or video of a batch. `single`: encoded as one crop, because its row holds several images."""

    kind: str
    spec: Spec
    single: bool = False


class Family:
    """One family: its file in `families/` is called like the `model_type` and holds one subclass, `Tiny`.

    A spec is (height, width) in pixels, or what else the family's inputs are measured in: a grid (frames, height,
    width) in patches, a number of frames.

    Attributes:
        classes: how the names of its classes in transformers begin; processes: that of its processor, where it is
            another family's.
        words: that stand for an image and for a video; around: those that enclose either; marks: further
            special tokens; written:
            what a prompt says for an image, if not the word that its tokens have.
        pixels: what the model calls those of images.
        image: spec of "img" in `tiny.build`; video: of "video", None where the family takes none.
        other, odd: further images: of another raster, and one that is padded or scaled where the family does so.
        other_video: a video of four frames and another size, where sizes may differ.
        pictures: (height, width, frames) of what the FLOPs account is held against.
        unpadded: (height, width) of a picture of which packing cuts nothing away.
        leading: most tests of `make test` that know families run on it; of the others a share, see tests/conftest.py.
        varlen: the tower takes the patches of all images in one sequence.
        by_rows: it does so row by row, and a mask keeps images apart.
        by_grids: it does so row by row, and its projector is told the grids of the images.
        crops_sized: crops have sizes of their own, and are padded to a common length in a batch.
        unit: patches that become one visual token.
        full_attention: tower layers whose tokens see the whole image; None: all.
        states: decoder layers that keep a state instead of attending.
        types: name of the input that says of every token whether it is text or part of a picture; "": there is none.
        window: tokens that some decoder layers see, the newest ones; None: all layers see all.
        both_ways: the tokens of an image see each other both ways in the decoder.
        deepstack: decoder layers that are given features of early tower layers.
        rows_parted: a token of its own stands between the rows of an image.
        frames_led: a CLS token stands in front of the tokens of every frame.
        anyres: images are cut into crops, with a newline token behind each row of them.
        split: images are cut into crops that text parts in the prompt, the whole behind them; a spec is (rows, columns)
            of crops, (0, 0) where it is not cut.
        crops_one_only: they are cut only in a row that holds no other image.
        equal_videos: videos of a batch must have equally many frames.
        pooled_videos: frames are scaled down behind the tower by interpolation.
        one_placeholder: images and videos have one placeholder, and a call holds either.
        video_beams: transformers can repeat the rows of a prompt with a video (beams, several return sequences).
        gaps_for_flash: the stock decoder hands its attention positions of three axes, which flash attention would take
            for packed sequences.
        rotates_part: RoPE of the decoder turns a part of a head's channels.
        rotates_neighbours: RoPE of the decoder turns channels 0 and 1, 2 and 3, ..., not halves of a head.
        expands_several: transformers from 5.18 on can repeat the rows of a prompt with several images.
        reads_stem: the stock tower reads the weight of its patch embedding, a Linear.
        offloads: the stock model runs with its weights offloaded by accelerate.
        shipped_picture: visual tokens of a picture of the shipped questions, newlines not counted.
        steady: fields of the decoder under which bfloat16 is held to the bounds of all families. Mixtures of experts are
            not continuous: rounding sends a token now and then to another expert, and its logits jump (by 0.33 of the
            largest seen, where the bound is 0.05); so there every expert is active. In float32 they are held as they are.
        float32_error: how far float32 logits may be from the oracle's.
        checkpoints: hub names of the built-in configs -> their parameters in millions.
        waits: (kind, file:function) where a prefill of one picture waits for the device beside what every family does.
    """

    classes: ClassVar[str]
    processes: ClassVar[str] = ""
    words: ClassVar[tuple[str, str]] = ("<image>", "<video>")
    around: ClassVar[tuple[str, str]] = ("", "")
    marks: ClassVar[tuple[str, str]] = ("<|vision_start|>", "<|vision_end|>")
    written: ClassVar[str] = ""
    pixels: ClassVar[str] = "pixel_values"
    image: ClassVar[Spec]
    other: ClassVar[Spec]
    odd: ClassVar[Spec]
    video: ClassVar[Spec | None] = None
    other_video: ClassVar[Spec] = ()
    pictures: ClassVar[Sequence[tuple[int, int, int]]]
    unpadded: ClassVar[tuple[int, int]] = (56, 112)
    leading: ClassVar[bool] = False
    varlen: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False
    by_grids: ClassVar[bool] = False
    crops_sized: ClassVar[bool] = False
    unit: ClassVar[int] = 1
    full_attention: ClassVar[tuple[int, ...] | None] = None
    types: ClassVar[str] = ""
    window: ClassVar[int | None] = None
    both_ways: ClassVar[bool] = False
    deepstack: ClassVar[int] = 0
    rows_parted: ClassVar[bool] = False
    states: ClassVar[tuple[int, ...]] = ()
    frames_led: ClassVar[bool] = False
    anyres: ClassVar[bool] = False
    split: ClassVar[bool] = False
    crops_one_only: ClassVar[bool] = False
    equal_videos: ClassVar[bool] = False
    pooled_videos: ClassVar[bool] = False
    one_placeholder: ClassVar[bool] = False
    video_beams: ClassVar[bool] = True
    gaps_for_flash: ClassVar[bool] = False
    rotates_part: ClassVar[bool] = False
    rotates_neighbours: ClassVar[bool] = False
    expands_several: ClassVar[bool] = True
    reads_stem: ClassVar[bool] = False
    offloads: ClassVar[bool] = True
    shipped_picture: ClassVar[int]
    steady: ClassVar[dict[str, Any]] = {}
    float32_error: ClassVar[float] = 2e-4
    checkpoints: ClassVar[dict[str, int]] = {}
    waits: ClassVar[Sequence[tuple[str, str]]] = ()

    def __init__(self, name: str) -> None:
        self.name = name
        self._counted: dict[Picture, int] = {}

    @property
    def takes_video(self) -> bool:
        return self.video is not None

    @property
    def grouped(self) -> bool:
        """Whether the tower's one sequence holds the patches of a token side by side."""
        return self.varlen and not (self.by_rows or self.by_grids)

    @property
    def attending(self) -> tuple[int, ...]:
        """Decoder layers, of the four, that attend."""
        return tuple(k for k in range(4) if k not in self.states)

    @property
    def served(self) -> bool:
        """Whether the vLLM plugin serves it."""
        return self.name in serving.families()

    @property
    def mrope(self) -> bool:
        """Whether positions have several axes."""
        return registry.adapter(self.name).mrope

    @cached_property
    def stock(self) -> PreTrainedModel:
        """A model that nothing is done to."""
        return self.make()

    # The model and its processor.

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        """Of the config; `text` are those of the decoder's."""
        raise NotImplementedError

    def make(self, attn: str = "sdpa", seed: int = 0, **text: Any) -> PreTrainedModel:
        config = getattr(transformers, f"{self.classes}Config")(
            **self.fields({**TEXT, **text}), tie_word_embeddings=False, dtype="float32"
        )
        kind = getattr(transformers, f"{self.classes}ForConditionalGeneration")
        return finish(kind, config, attn, seed, range(IMG, VISION_END + 1))

    def processor(self, kind: Any, tokenizer: Any, **options: Any) -> Any:
        """The stock processor; `kind` is its class without the video half, `options` its chat template."""
        raise NotImplementedError

    # Prompts.

    def item(self, height: int, width: int, frames: int = 1) -> Any:
        """What stands in the rows of `tiny.build` for a picture of so many pixels."""
        raise NotImplementedError

    def sized(self, kind: str, given: Spec) -> Spec | None:
        """The spec that `(kind, *given)` in a row stands for; None where there is no such picture."""
        default = self.image if kind == "img" else self.video if kind == "video" else None
        if default is None or len(given) > len(default):
            return None
        if kind == "img":
            return None if given and len(given) < len(default) else given or default
        return given + default[len(given) :]

    def marker(self, kind: str) -> int:
        """The placeholder of an image or a video."""
        return IMG if kind == "image" else VID

    def placeholders(self, picture: Picture, words: Callable[[int], list[int]]) -> list[int]:
        """The ids that a processor writes for a picture."""
        return [self.marker(picture.kind)] * self.tokens(picture)

    def tokens(self, picture: Picture) -> int:
        """Its placeholders: as many as the rows that an unwrapped model makes of it."""
        if picture not in self._counted:
            self._counted[picture] = len(self.features(picture))
        return self._counted[picture]

    @torch.no_grad()
    def features(self, picture: Picture, **more: Tensor) -> Tensor:
        inputs = self.inputs([picture], torch.zeros)
        name = "pixel_values_videos" if picture.kind == "video" else self.pixels
        pixels = inputs.pop(name)
        encode = getattr(self.stock.model, f"get_{picture.kind}_features")
        return encode(pixels, **inputs, **more, return_dict=True).pooler_output[0]

    def inputs(self, pictures: Sequence[Picture], draw: Draw) -> dict[str, Tensor]:
        """What the encoder is given for these pictures, in reading order."""
        raise NotImplementedError

    def rows(self, picture: Picture) -> int:
        """Rows of the pixels of a batch that are this picture's."""
        return 1

    def breaks(self, ids: Tensor) -> Tensor:
        """[B, L] bool: which of a batch's ids stand between rows of an image, and are none of its features."""
        return torch.zeros_like(ids, dtype=torch.bool)

    def leads(self, ids: Tensor) -> Tensor:
        """[B, L] bool: which of a batch's ids are CLS tokens in front of frames."""
        return torch.zeros_like(ids, dtype=torch.bool)

    def beside(self, ids: Tensor, images: Sequence[int]) -> dict[str, Tensor]:
        """What else a processor returns for ids [B, L] with so many images in each row."""
        return {}

    def found(self, batch: dict[str, Tensor]) -> tuple[list[Picture], list[Picture]]:
        """The images and the videos of a batch from `tiny.build`."""
        raise NotImplementedError

    def frames(self, video: Spec) -> tuple[int, int]:
        """How many frames (Qwen: pairs of frames) of how many patches the tower sees apart."""
        return video[0], TOKENS


def listed(batch: dict[str, Tensor], name: str) -> list[Any]:
    return batch[name].tolist() if name in batch else []
