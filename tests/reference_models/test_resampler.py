"""The shipped resampler answers as the model does from all tokens; averages of as many tokens do not."""

from pathlib import Path

import torch

import vtoken
from vtoken.evals import reference

WEIGHTS = str(Path(__file__).parents[2] / "reference_models" / "tiny-llava-resampler.safetensors")
MODULE = "reference_models.resampler:Resampler"


def test_64_tokens_of_a_trained_module_answer():
    torch.set_num_threads(1)
    model, processor = reference.load()
    asked = reference.questions(24)

    def right(pipeline):
        with vtoken.wrapped(model, pipeline):
            table = reference.score(asked, reference.answers(model, processor, asked))
            assert vtoken.trace(model).tokens_out[0] == 64
        return sum(found for found, _ in table.values())

    assert right([{"learned_compressor": {"module": MODULE, "weights": WEIGHTS}}]) >= 22
    assert right([{"pool": {"size": 3}}]) <= 14


def test_training_runs(tmp_path):
    from reference_models.resampler import train

    train(tmp_path / "it.safetensors", side=4, steps=1)
    options = {"module": MODULE, "weights": str(tmp_path / "it.safetensors")}
    model, processor = reference.load()
    with vtoken.wrapped(model, [{"learned_compressor": options}]):
        reference.answers(model, processor, reference.questions(1))
        assert vtoken.trace(model).tokens_out == [16]
