"""Models by name: shipped, in a folder, on the hub, or with random weights from a config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vtoken.errors import ConfigError, reason, unknown
from vtoken.evals import processors, reference
from vtoken.evals.shared import torchvision
from vtoken.evals.shared.bars import terminal_only
from vtoken.evals.shared.configs import locate, resolve_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name: str,
    device: str | None = None,
    dtype: str | None = None,
    *,
    random_weights: bool = False,
    seed: int = 0,
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """A stock model in evaluation mode.

    Args:
        name: shipped model (`tiny-llava`), folder or hub name; with `random_weights` also a built-in config.
        device: where it goes, "cpu", "cuda", "cuda:1"; None is the GPU if there is one.
        dtype: one of `DTYPES`; None keeps what weights or config say.
        random_weights: fill the config's shapes on the device, as transformers initialises them; nothing is downloaded.
        seed: of random weights; torch's generators are left as they were.
        attn_implementation, revision: as `from_pretrained` takes them; None is transformers' choice.

    Raises:
        ConfigError: there is no such model, device or dtype; names what there is.
    """
    target, number = to_device(device), DTYPES.get(dtype or "")
    if dtype is not None and number is None:
        raise ConfigError(unknown("dtype", dtype, DTYPES))
    from transformers import AutoModelForImageTextToText

    model: Any
    if random_weights:
        config = resolve_config(name)
        try:
            with torch.random.fork_rng(), target:
                torch.manual_seed(seed)
                model = AutoModelForImageTextToText.from_config(config, dtype=number or config.dtype or torch.float32)
        except ValueError as error:
            raise ConfigError(f"cannot build {name!r} from its config: {reason(error)}") from error
        return model.train(False)
    source = locate(name)
    asked = {"attn_implementation": attn_implementation, "revision": revision}
    options = {key: value for key, value in asked.items() if value is not None}
    try:
        with terminal_only():
            model = AutoModelForImageTextToText.from_pretrained(source, dtype=number or "auto", **options)
    except (OSError, ValueError, ImportError) as error:
        torchvision.check()
        raise ConfigError(
            f"cannot load model {name!r}: {reason(error)} (shipped: "
            f"{', '.join(reference.names())}; vtoken bench --random-weights builds a model from its config alone)"
        ) from error
    return model.to(target).train(False)


def load_pair(
    name: str, device: str | None = None, dtype: str | None = None, revision: str | None = None, **options: Any
) -> tuple[Any, Any]:
    """A model and its processor; `options` as `load` takes them."""
    return load(name, device, dtype, revision=revision, **options), processors.load(name, revision=revision)


def set_threads(count: int | None) -> None:
    """CPU threads of torch; None leaves them to torch."""
    if count is not None:
        torch.set_num_threads(count)


def to_device(name: str | None) -> torch.device:
    """The device of this name, None for the GPU if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{name!r} is not a device; write cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; write cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not here: torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    return device
