"""Assisted generation with a draft that runs on the states of its target: transformers' own loop is given chains of
guesses."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from vtoken.hooks.call.drafting import Drafting
from vtoken.hooks.state.read_prompt import ReadPrompt


class Chain(Protocol):
    """State of a draft during one `generate`. Every method returns logits [V] of the token after the last one given."""

    def read(self, prompt: ReadPrompt, token: Tensor) -> Tensor:
        """The prompt, and the first token [1] of the answer."""

    def verified(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Tokens [n] that the target gave since, and the last hidden state [n, D] of the token before each."""

    def ahead(self, token: Tensor) -> Tensor:
        """The guess [1] drawn from the logits returned last."""


class ChainGenerator(CandidateGenerator):
    """First the target reads the prompt alone. Then its draft (whose `chain()` returns a `Chain`) guesses at most
    `num_assistant_tokens` tokens (of the draft's generation config) after the target's last. Guesses are drawn as the
    target's tokens are: sampled where it samples, from the draft's logits after the target's logits processors.

    Args:
        drafting: joins target and draft.
        model_kwargs: of the target's loop; given: what else transformers hands to a candidate generator.
    """

    encodes: ClassVar[bool] = False

    def __init__(self, drafting: Drafting, model_kwargs: dict[str, Any], given: dict[str, Any]) -> None:
        self.drafting, self.chain = drafting, drafting.draft.chain()
        self.config, self.processors = given["generation_config"], given["logits_processor"]
        self.said, self.drafts = given["input_ids"].shape[1], given["input_ids"][:, :0]

    def get_candidates(self, input_ids: Any, **kwargs: Any) -> Any:
        self.drafts = input_ids[:, :0]
        new, self.said = input_ids.shape[1] - self.said, input_ids.shape[1]
        depth = min(self.drafting.draft.generation_config.num_assistant_tokens, self.config.max_length - self.said - 1)
        if not new or depth <= 0:
            return input_ids, None
        states, tokens = self.drafting.recorded.taken(), input_ids[0, -new:]
        if isinstance(states, ReadPrompt):
            logits = self.chain.read(states, tokens)
        else:
            logits = self.chain.verified(states[:new], tokens)
        ids, scores = input_ids, []
        while True:
            scores.append(self.processors(ids, logits[None].to(ids.device, torch.float32)))
            token = self._drawn(scores[-1])
            ids = torch.cat([ids, token], dim=1)
            if len(scores) == depth or self._ends(token):
                break
            logits = self.chain.ahead(token[0])
        self.drafts = ids[:, self.said :]
        return ids, torch.stack(scores, dim=1)

    def _drawn(self, scores: Tensor) -> Tensor:
        """[1, 1] the token drawn from scores [1, V]."""
        return scores.softmax(-1).multinomial(1) if self.config.do_sample else scores.argmax(-1, keepdim=True)

    def _ends(self, token: Tensor) -> bool:
        ends = self.config._eos_token_tensor
        return ends is not None and bool(torch.isin(token, ends.to(token.device)).any())

    def update_candidate_strategy(self, input_ids: Any, scores: Any, num_matches: int) -> None:
        if self.drafting.call.acceptance is not None and self.drafts.shape[1]:
            self.drafting.call.acceptance.note(self.drafts[0], input_ids[0, self.said :])
