"""A LLaVA with a SigLIP tower, which has no CLS token, in vLLM; its weights named as transformers saves them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig
from vllm_engine import Engine, Transformers, questions

from vtoken.evals import reference

pytestmark = pytest.mark.vllm
QUESTIONS = questions("tiny-llava", 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tiny-llava with a tower of random weights."""
    torch.manual_seed(0)
    folder, (other, processor) = tmp_path_factory.mktemp("siglip"), reference.load("tiny-llava")
    old = other.config.vision_config
    same = ("hidden_size", "image_size", "patch_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    vision = SiglipVisionConfig(**{name: getattr(old, name) for name in same}, vision_use_head=False)
    given = other.config.to_dict() | {"vision_config": vision.to_dict(), "vision_feature_select_strategy": "full"}
    model = LlavaForConditionalGeneration(LlavaConfig(**given))
    weights = {name: value for name, value in other.state_dict().items() if "vision_tower" not in name}
    model.load_state_dict(weights, strict=False)
    model.save_pretrained(folder)
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    """It starts, and is measured by vLLM, with a pipeline that reads the prompt; this one leaves all tokens."""
    return Engine(folder, {"positions": "compact", "stages": ["cdpruner:576"]})


@pytest.fixture(scope="module")
def transformers(folder):
    return Transformers(folder)


@pytest.mark.parametrize(
    "stage", [None, "fastervlm:64", {"visionzip": {"keep": 64, "heads": 4}}, "flowcut:64"], ids=str
)
def test_answers_and_kept_tokens_are_those_of_transformers(engine, transformers, stage):
    pipeline = None if stage is None else {"positions": "compact", "stages": [stage]}
    engine.swap(pipeline)
    wanted, said = transformers(pipeline, QUESTIONS), engine(QUESTIONS)
    assert said.ids == wanted.ids and said.prompt_tokens == wanted.prompt_tokens
    assert said.kept == wanted.kept[::6]


def test_names_of_weights():
    """As stock vLLM wants them, as transformers saves them, and of a tower that is another's."""
    from vtoken.serving._llava import Llava

    names = Llava.hf_to_vllm_mapper
    for name in ("vision_tower.encoder.layers.0.x", "model.vision_tower.vision_model.encoder.layers.0.x"):
        assert names.map_name(name) == "vision_tower.vision_model.encoder.layers.0.x"
    assert names.map_name("vision_tower.transformer.layers.0.x") == "vision_tower.transformer.layers.0.x"
