"""JSON Schema of a pipeline file."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from vtoken import registry
from vtoken.config.policies import CONTRAST, DRAFT, LEAST, POLICIES, PRESET
from vtoken.stages import SITES


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a pipeline file for editors, composed from every stage that can be imported."""
    stages, _ = registry.catalogue()
    refs, defs = models_json_schema([(cls, "validation") for cls in stages.values()], ref_template="#/$defs/{model}")
    bare = [name for name, cls in stages.items() if not any(f.is_required() for f in cls.model_fields.values())]
    options = {
        name: {"anyOf": [refs[cls, "validation"], {"type": "null"}]} if name in bare else refs[cls, "validation"]
        for name, cls in stages.items()
    }
    items = {
        "type": "object",
        "properties": options,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vtoken pipeline",
        "description": "Stages that drop, merge or retire visual tokens, in the order the data flows.",
        "type": "object",
        "properties": {
            **{
                key: {"description": meaning, "enum": list(values), "default": values[0]}
                for key, (values, meaning) in POLICIES.items()
            },
            PRESET: {
                "description": "takes the stages of this preset, and its policies where no others are given here",
                "enum": registry.presets(),
            },
            LEAST: {
                "description": "batch rows with fewer visual tokens (counted before anything is dropped) run dense, "
                "the others as usual; where features are asked for without a prompt, each image counts for itself in "
                "stages of the vision tower",
                "type": "integer",
                "minimum": 0,
                "default": 0,
            },
            DRAFT: {
                "description": "the pipeline of the draft that vtoken.draft(model) makes; wrap alone makes none",
                "anyOf": [{"type": "string"}, {"$ref": "#"}, {"$ref": "#/properties/stages"}],
            },
            CONTRAST: {
                "description": "what answers of generate are compared with: (1 + alpha) l - alpha l', l' the logits "
                "under this pipeline; words with l below ln beta + max l are out",
                "type": "object",
                "allOf": [{"anyOf": [{"required": ["stages"]}, {"required": [PRESET]}]}],
                "properties": {
                    "alpha": {"type": "number", "minimum": 0, "default": 1.0},
                    "beta": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.1},
                    "stages": {"$ref": "#/properties/stages"},
                    **{key: {"$ref": f"#/properties/{key}"} for key in (*POLICIES, PRESET, LEAST)},
                },
                "additionalProperties": False,
            },
            "stages": {
                "description": f"sites must not go backwards: {', '.join(SITES)}",
                "type": "array",
                "items": {"anyOf": [items, {"enum": bare}]},
            },
        },
        "oneOf": [{"required": ["stages"]}, {"required": [PRESET]}],
        "additionalProperties": False,
        "$defs": defs.get("$defs", {}),
    }
