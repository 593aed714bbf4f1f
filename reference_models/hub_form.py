"""A saved model as checkpoints on the Hub are, so that serving engines and older transformers read it, too.

transformers 5 writes CLIP's tower without the `vision_model` that llava-hf/llava-1.5-7b-hf has in its names, and the
RoPE in a new key of the config; it reads both. `python -m reference_models.hub_form FOLDER` rewrites a saved model;
training does it by itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

TOWER, CLIP = "vision_tower.", "vision_tower.vision_model."


def hub_name(name: str) -> str:
    """The name on the Hub of a tensor that transformers 5 saved."""
    return name if name.startswith(CLIP) else name.replace(TOWER, CLIP, 1) if name.startswith(TOWER) else name


def rewrite(folder: Path) -> None:
    """Renames the tensors in a folder's model.safetensors, whose values stay as they are, and repeats the decoder's
    RoPE in its config.json under the old keys."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as held:
        about, tensors = held.metadata(), {hub_name(name): held.get_tensor(name) for name in held.keys()}
    mode = file.stat().st_mode
    save_file(tensors, file, about)
    file.chmod(mode)  # safetensors lets its owner alone read it
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    text["rope_theta"] = text["rope_parameters"]["rope_theta"]
    if "mrope_section" in text["rope_parameters"]:
        text["rope_scaling"] = {"mrope_section": text["rope_parameters"]["mrope_section"], "type": "mrope"}
    config["text_config"] = dict(sorted(text.items()))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]))
