"""A model's processor. Without torchvision it takes pictures, through Pillow, and no videos.

transformers builds the video half of a processor whether or not it is used, and that half needs torchvision.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from vtoken.errors import ConfigError, UnsupportedError, reason
from vtoken.evals import reference
from vtoken.evals.shared import torchvision
from vtoken.evals.shared.configs import locate
from vtoken.hooks.state.run import PIXELS


def load(source: str | Path, *, pillow: bool = False, revision: str | None = None) -> Any:
    """The processor of a reference model, a folder or a hub name, padding on the left.

    Args:
        pillow: prepare pictures with Pillow also where torchvision is installed, so that the same picture gives the
            same pixels; reference models always do.
        revision: of a hub name; None is its main branch.

    Raises:
        ConfigError: it cannot be loaded; the message has the first line of transformers' reason.
    """
    from transformers import AutoConfig, AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    pillow, source = pillow or source in reference.names(), locate(source)
    asked = {} if revision is None else {"revision": revision}
    try:
        kind: Any = present(PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(source, **asked))])
        if not is_torchvision_available():
            processor = pictures_only(kind).from_pretrained(source, backend="pil", **asked)
        else:
            processor = _with_videos(kind, source, asked)
            if pillow:  # not asked of the whole processor: its video half has torchvision only
                processor.image_processor = AutoImageProcessor.from_pretrained(source, backend="pil", **asked)
    except (OSError, ValueError, KeyError, ImportError) as error:
        torchvision.check()
        raise ConfigError(f"cannot load the processor of {source!r}: {reason(error)}") from error
    processor.tokenizer.padding_side = "left"
    return processor


def _with_videos(kind: Any, source: str | Path, asked: dict[str, str]) -> Any:
    """The stock processor; of a folder that says nothing of videos, one without them."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source, **asked)
    except OSError as error:
        if "video processor" not in str(error):
            raise
        return pictures_only(kind).from_pretrained(source, **asked)


def present(kind: Any) -> Any:
    """The class that transformers hides without torchvision.

    Pixtral's processor is hidden for one function of plain arithmetic, which the one for Pillow has as well.
    """
    from transformers.utils import is_torchvision_available

    home = kind.__module__.replace(".processing_", ".image_processing_")
    if is_torchvision_available() or kind.__qualname__.rpartition(".")[2] != "Placeholder":
        return kind
    sys.modules[home] = import_module(home.replace(".image_processing_", ".image_processing_pil_"))
    try:
        found = [value for value in vars(import_module(kind.__module__)).values() if isinstance(value, type)]
    finally:
        del sys.modules[home]
    return next(cls for cls in found if cls.__module__ == kind.__module__ and cls.__name__.endswith("Processor"))


def pictures_only(kind: type[Any]) -> type[Any]:
    """The processor class without its video half; a class without one as it is.

    Its constructor takes what the class takes; what it saves has no settings for videos.
    """
    from transformers import ProcessorMixin

    parts = kind.get_attributes()
    if "video_processor" not in parts:
        return kind
    place = parts.index("video_processor")

    class Still(ProcessorMixin):
        """Comes after the class, whose constructor hands over its parts in their order."""

        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given[:place], *given[place + 1 :], **named)

    def from_args_and_dict(cls: Any, args: Any, settings: dict[str, Any], **options: Any) -> Any:
        # What is loaded are the other parts, by position.
        return super(made, cls).from_args_and_dict([*args[:place], None, *args[place:]], settings, **options)

    module: Any = sys.modules[kind.__module__]
    if getattr(module, "num2words", kind) is None:
        vars(module)["num2words"] = _in_words
    fields = {
        # One that prepares videos too asks that half for its settings.
        "apply_chat_template": ProcessorMixin.apply_chat_template,
        "get_attributes": classmethod(lambda cls: [name for name in parts if name != "video_processor"]),
        "from_args_and_dict": classmethod(from_args_and_dict),
        # Written into saved files, where the stock class must find itself.
        "__module__": kind.__module__,
    }
    made: Any = type(kind.__name__, (kind, Still), fields)
    return made


def _in_words(number: int) -> str:
    """In place of num2words where it is missing: a processor asks for it when it is made, and needs it for videos."""
    raise ImportError(f"num2words is needed to write a video of {number} frames into a prompt: pip install num2words")


def apply(processor: Any, what: str, model: Any = None, **given: Any) -> Any:
    """What the processor makes of pictures and texts.

    Args:
        what: names the pictures in errors.
        model: on whose device, and pixels in whose dtype; None leaves all as it is.
        given: as the processor takes it.

    Raises:
        UnsupportedError: it refuses them.
    """
    try:
        inputs = processor(return_tensors="pt", **given)
    except ValueError as error:
        raise UnsupportedError(f"the model's processor does not take {what}: {reason(error)}") from error
    if model is None:
        return inputs
    inputs = inputs.to(model.device)
    for name in {name for names in PIXELS.values() for name in names} & set(inputs):
        inputs[name] = inputs[name].to(model.dtype)
    return inputs


def check_video(processor: Any) -> None:
    """Refuses a processor that cannot take videos.

    Raises:
        UnsupportedError: the family has no videos, or torchvision is missing.
    """
    if hasattr(processor, "video_processor"):
        return
    if not hasattr(processor, "video_token"):
        raise UnsupportedError(f"{type(processor).__name__} takes pictures only: this family has no videos")
    raise UnsupportedError(f"videos need torchvision, which transformers prepares them with: {torchvision.mend()}")
