"""A second tree of modules on the same weights."""

from __future__ import annotations

from copy import copy, deepcopy
from types import MethodType
from typing import Any

from torch import nn

from vtoken.errors import UnsupportedError


def twin(model: nn.Module) -> Any:
    """A model that shares every parameter and the config with this one: hooks, attributes and what modules remember
    from call to call (rope_deltas) are its own. Buffers are shared until one of the two gets others, as by `to`.

    Raises:
        UnsupportedError: a module's `forward` is an instance attribute (accelerate sets one where it spreads a model
            over devices), which would run the first tree.
    """
    made: dict[int, nn.Module] = {}
    found = _twin(model, made)
    for module in made.values():
        own = vars(module)
        for name, value in own.items():
            if isinstance(value, MethodType) and id(value.__self__) in made:
                own[name] = MethodType(value.__func__, made[id(value.__self__)])
    if hasattr(model, "generation_config"):
        vars(found)["generation_config"] = deepcopy(model.generation_config)
    return found


def _twin(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    own = vars(module)
    if "forward" in own:
        raise UnsupportedError(
            f"the forward of {type(module).__name__} is not its own (accelerate replaces it where a model is spread "
            "over devices or offloaded), so the model cannot draft for itself; load it on one device, or give another "
            "checkpoint as draft"
        )
    other = made[id(module)] = object.__new__(type(module))
    # Dicts of hooks and buffers are copied; the dict of parameters is the same, so that new weights reach both.
    vars(other).update({k: copy(v) if isinstance(v, dict) and k != "_parameters" else v for k, v in own.items()})
    children = {name: child if child is None else _twin(child, made) for name, child in module._modules.items()}
    vars(other)["_modules"] = type(module._modules)(children)
    return other
