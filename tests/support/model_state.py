"""Everything on a model that `unwrap` must leave as it was."""

from __future__ import annotations


def state(model):
    """Everything a wrap could leave behind: attributes by identity, hooks by their functions. Weights are compared
    apart."""
    return {
        name: {k: list(v.values()) if k.endswith(("_hooks", "_kwargs")) else id(v) for k, v in vars(m).items()}
        for name, m in model.named_modules()
    }


def changed(before, after):
    """(module, attribute) of all that differs; the model itself stores `rope_deltas` anew at every run."""
    assert before.keys() == after.keys()
    return {
        (name, k)
        for name, held in before.items()
        for k in held.keys() | after[name].keys()
        if held.get(k) != after[name].get(k)
    }
