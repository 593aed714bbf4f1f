"""transformers' continuous batching never sees pictures, so a wrapped model refuses it."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from vtoken.errors import UnsupportedError
from vtoken.evals import reference
from vtoken.session import wrapped

REASON = "takes token ids without pictures"


def test_it_is_refused_while_the_model_is_wrapped_and_works_afterwards() -> None:
    model, processor = reference.load("tiny-llava", dtype=torch.float32)
    ids = processor.tokenizer("USER: hello ASSISTANT:")["input_ids"]
    asked = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0)
    with wrapped(model, "fastervlm:64"):
        with pytest.raises(UnsupportedError, match=REASON):
            model.generate_batch([ids], generation_config=asked, progress_bar=False)
        with pytest.raises(UnsupportedError, match=REASON):
            model.init_continuous_batching(generation_config=asked)
        alone = model.generate(torch.tensor([ids]), generation_config=asked)[0, len(ids) :]
    (batched,) = model.generate_batch([ids], generation_config=asked, progress_bar=False).values()
    assert batched.error is None and batched.generated_tokens == alone.tolist()
    assert "init_continuous_batching" not in vars(model)
