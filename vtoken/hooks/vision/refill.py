"""A vision tower that runs on a part of its patches and estimates the others.

Before layer k a stage chooses patches. A dropped patch is estimated as its value before layer k plus the mean change,
since then, of the nearest patches that stayed. In the next layers attention still sees the estimates while the MLP runs
on what stayed; later layers run on that alone. Where features are read, estimates fill the gaps: all tokens are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.checkpointing import check_replay, replays
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.live_tokens import check, skipped_entry, trace_of
from vtoken.hooks.state.run import Clock
from vtoken.hooks.vision.masked_layer import MaskedLayer
from vtoken.hooks.vision.pixel_stages import parted
from vtoken.stages import Fact, Stage, VisualTokens

CHUNK = 1 << 24  # distances in memory at once: 64 MiB
# Where the segments of one sequence lie: bounds first, then the longest.
SEGMENTS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_seqlen", "max_length_q", "max_length_k")


@dataclass
class Estimates:
    """What stands in for dropped patches. Patches are counted over all images, in the tower's order.

    Attributes:
        kept, dropped: [K], [R] which patches stay, ascending, and which do not.
        near: [R, n] places in `kept` of the nearest patches, K where an image kept fewer than n.
        before, frozen: [K, D], [R, D] hidden states of the kept and the dropped patches when they were parted.
        rotary: cos and sin of the kept patches; segments: theirs, by argument name and whether attention is full.
        whole, batch: how all patches, and the kept ones, lie in a padded tower; None in a packed one.
    """

    kept: Tensor
    dropped: Tensor
    near: Tensor
    before: Tensor
    frozen: Tensor
    segments: dict[tuple[str, bool], Any] = field(default_factory=dict)
    rotary: tuple[Tensor, ...] | None = None
    whole: Any = None
    batch: Any = None

    @property
    def total(self) -> int:
        return len(self.kept) + len(self.dropped)

    def fill(self, rows: Tensor) -> Tensor:
        """[K, D] hidden states of the kept patches now -> [K + R, D] with estimates of the others."""
        change = torch.cat([rows - self.before, rows.new_zeros(1, rows.shape[1])])
        total = sum(change[column] for column in self.near.T)  # never [R, n, D]
        mean = total / (self.near < len(rows)).sum(1, keepdim=True)
        out = rows.new_empty(self.total, rows.shape[1])
        return out.index_copy(0, self.kept, rows).index_copy(0, self.dropped, (self.frozen + mean).to(rows.dtype))


def nearest(dropped: Tensor, kept: Tensor, count: int) -> Tensor:
    """[R, n] which rows of kept [K, D] are nearest to each row of dropped [R, D], n = min(count, K)."""
    size = max(1, CHUNK // max(1, len(kept)))
    found = [
        torch.cdist(part, kept.float(), compute_mode="donot_use_mm_for_euclid_dist")
        .topk(min(count, len(kept)), largest=False)
        .indices
        for part in dropped.float().split(size)
    ]
    return torch.cat(found)


def mlp_of(layer: nn.Module) -> Any:
    """The MLP of a tower's layer, None if it has no known name."""
    return getattr(layer, "mlp", getattr(layer, "feed_forward", None))


def without_refill(stages: Sequence[Stage]) -> list[Stage]:
    """Those stages that drop or merge visual tokens."""
    return [stage for stage in stages if stage.refills() is None]


def refill(context: Context, stages: Sequence[Stage], state: Callable[[], Any]) -> None:
    """Installs those stages that estimate what they drop; `state` returns the tower's state."""
    for stage in (stage for stage in stages if stage.refills() is not None):
        Refill(context, stage, state)


class Refill:
    """Hooks on the layers of a tower for one stage.

    Args:
        state: returns the tower's state.

    Raises:
        UnsupportedError: a layer of the tower has no known MLP, or other stages or facts of late layers conflict.
    """

    def __init__(self, context: Context, stage: Stage, state: Callable[[], Any]) -> None:
        self.encoder, self.stage, self.state, handle = context.adapter.encoder, stage, state, context.handle
        self.tower = context.adapter.tower
        numbers = stage.refills()
        assert numbers is not None
        self.count, stabilised = numbers
        (after,) = stage.layers(len(self.encoder.layers))
        self.first, self.alone = after + 1, after + 1 + stabilised
        self.lead = int(self.encoder.cls)
        self._check(context)
        for layers in (self.encoder.layers, *(layers for _, layers in self.encoder.twins)):
            for k, module in enumerate(layers):
                if k >= after:
                    handle.before(module, partial(self._before, k))
                if k >= self.first:
                    if k < self.alone:
                        handle.before(mlp_of(module), self._kept)
                        handle.after(mlp_of(module), self._spread)
                    handle.after(module, partial(self._after, k), first=True)
                if k >= self.alone and not self.encoder.takes_mask:
                    MaskedLayer(handle, module, self.encoder.attention)
        for merger in context.adapter.projectors[1:] if self.encoder.packed else ():
            handle.before(merger, self._tapped)

    def _check(self, context: Context) -> None:
        name, why = self.stage.name, ""
        _, choosers = parted(context.at("pixels"))
        late = [fact for fact in context.wanted if fact.layer is not None and fact.layer >= self.alone]
        if not all(map(mlp_of, self.encoder.layers)):
            why = "the layers of this vision tower have no mlp"
        elif len(context.at("frames", "encoder")) > 1 or choosers:
            why = "it needs all patches of a picture; leave stages out that choose among pixels, frames or patches"
        elif late:
            why = (
                f"a later stage reads {late[0].name} of encoder layer {late[0].layer}, which sees a part of the "
                f"patches; ask for layer {self.alone - 1} or an earlier one, or for features"
            )
        if why:
            raise UnsupportedError(f"stage {name} estimates patches inside the vision tower: {why}")

    def _batch(self, hidden: Tensor) -> Any:
        """How the crops of a padded tower lie in these hidden states, by their width."""
        found = self.state().estimates
        if found is None:
            return getattr(self.state(), "given", self.state().batch)
        return found.whole if hidden.shape[1] == found.whole.columns + self.lead else found.batch

    def _rows(self, hidden: Tensor) -> Tensor:
        """[..., P, D] as the tower holds it -> [ΣP, D] without CLS and padding."""
        if self.encoder.packed:
            return hidden[0] if hidden.ndim == 3 else hidden
        return self._batch(hidden).patches(hidden)

    def _laid_out(self, rows: Tensor, like: Tensor) -> Tensor:
        """The reverse of `_rows`, in the layout of the tower; CLS is taken from `like`."""
        if self.encoder.packed:
            return rows[None] if like.ndim == 3 else rows
        found: Estimates = self.state().estimates
        batch = found.whole if len(rows) == found.total else found.batch
        return batch.pad(rows, like[:, : self.lead] if self.lead else None)

    def _long(self, hidden: Tensor) -> bool:
        """Whether hidden states hold all patches."""
        return len(self._rows(hidden)) == self.state().estimates.total

    def _trim(self, hidden: Tensor) -> Tensor:
        return self._laid_out(self._rows(hidden)[self.state().estimates.kept], hidden)

    def _fill(self, hidden: Tensor) -> Tensor:
        return self._laid_out(self.state().estimates.fill(self._rows(hidden)), hidden)

    def _before(self, k: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        state = self.state()
        if state is None:
            return None
        check_replay(module)
        if len(args) > 1:  # a mask
            args, kwargs = args[:1], {**kwargs, "attention_mask": args[1]}
        hidden = args[0] if args else kwargs["hidden_states"]
        if k == self.first - 1:
            state.entered = self._rows(hidden.detach())
        if k == self.first:
            self._decide(state, hidden, module)
        if k < self.first or state.estimates is None:
            return None
        if k < self.alone:
            new, more = (hidden if self._long(hidden) else self._fill(hidden)), {}
        else:
            new, more = (self._trim(hidden) if self._long(hidden) else hidden), self._of_kept(k, hidden, kwargs)
        return ((new,), {**kwargs, **more}) if args else (args, {**kwargs, "hidden_states": new, **more})

    @torch.no_grad()
    def _decide(self, state: Any, hidden: Tensor, module: nn.Module) -> None:
        stage, rows = self.stage, self._rows(hidden)
        if state.skip_reason is not None:
            state.traces.append(skipped_entry(stage, state.history, state.skip_reason, self.first - 1))
            return
        if replays(module):
            raise UnsupportedError(
                f"stage {stage.name} estimates patches between vision layers, which gradient checkpointing runs again "
                "when that is forgotten; call model.gradient_checkpointing_disable(), or tower.eval()"
            )
        lengths = tuple(n * self.encoder.unit for n in state.history.full)
        change = (rows.float() - state.entered.float()).norm(dim=-1)
        line = torch.cat([torch.arange(n, device=rows.device) for n in lengths])
        parts = tuple(((1, 1, n),) for n in lengths)
        tokens = VisualTokens.pack(
            rows, lengths, parts, range(len(lengths)), line, facts={Fact("change"): change}, layer=self.first - 1
        )
        with Clock(rows.device) as clock:
            keep = stage.select(tokens)
            check(stage, keep, lengths)
            if any(state.skipped):
                keep = keep.skipping(lengths, state.skipped)
            if keep.lengths != lengths:
                whole = None if self.encoder.packed else self._batch(hidden)
                state.estimates = self._estimates(rows, keep.index, keep.lengths, lengths)
                state.estimates.whole, state.estimates.batch = whole, whole and whole.of(keep.lengths)
        # No token of the LLM is lost.
        state.traces.append(trace_of(stage, state.history.counts, state.history, clock, self.first - 1))

    def _estimates(self, rows: Tensor, kept: Tensor, counts: Sequence[int], lengths: Sequence[int]) -> Estimates:
        """Finds, image by image, the dropped patches and their nearest kept patches of the same image."""
        gone = torch.ones(len(rows), dtype=torch.bool, device=rows.device).index_fill(0, kept, False)
        dropped = gone.nonzero()[:, 0]
        near, start = [], 0
        lost = [n - k for n, k in zip(lengths, counts, strict=True)]
        for mine, others in zip(kept.split(list(counts)), dropped.split(lost), strict=True):
            found = nearest(rows[others], rows[mine], self.count) + start
            near.append(F.pad(found, (0, self.count - found.shape[1]), value=len(kept)))
            start += len(mine)
        return Estimates(kept, dropped, torch.cat(near), rows[kept], rows[dropped])

    def _of_kept(self, k: int, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        """Arguments of layer k for the kept patches."""
        found: Estimates = self.state().estimates
        e, mask = self.encoder, kwargs.get("attention_mask")
        if not e.packed:
            flash = "flash" in (self.tower.config._attn_implementation or "")
            return {"attention_mask": found.batch.mask(hidden, flash)}
        more: dict[str, Any] = {} if mask is None else {"attention_mask": self._mask(found, mask)}
        if found.rotary is None:
            found.rotary = tuple(half[found.kept.to(half.device)] for half in kwargs["position_embeddings"])
        more["position_embeddings"] = found.rotary
        for name in (name for name in SEGMENTS if name in kwargs):
            more[name] = self._segments(found, name, e.full_attention is None or k in e.full_attention, kwargs[name])
        return more

    def _segments(self, found: Estimates, name: str, full: bool, old: Any) -> Any:
        """Bounds of the kept patches of every segment, or the longest; once each for full attention and windows."""
        if old is None or (name, full) in found.segments:
            return None if old is None else found.segments[name, full]
        if torch.is_tensor(old) and old.ndim:
            bounds = torch.searchsorted(found.kept, old.to(found.kept)).unique_consecutive()
            found.segments[name, full] = bounds.to(old)
            return found.segments[name, full]
        bounds = found.segments[next(key for key in found.segments if key[0].startswith("cu_") and key[1] == full)]
        found.segments[name, full] = int(bounds.diff().max())
        return found.segments[name, full]

    def _mask(self, found: Estimates, mask: Tensor) -> Tensor:
        """The mask [1, 1, P, P], cut to the patches that stay."""
        if mask.ndim != 4:
            raise UnsupportedError(
                f"stage {self.stage.name} cannot shorten the attention mask of this vision tower; load the model with "
                'attn_implementation="sdpa"'
            )
        at = found.kept.to(mask.device)
        return mask[:, :, at][..., at]

    def _kept(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Before the MLP: it is given the kept patches alone."""
        busy = self.state() is not None and self.state().estimates is not None
        return ((self._trim(args[0]), *args[1:]), kwargs) if busy else None

    def _spread(self, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        """After the MLP: zeros at the other patches, which are estimated anew after the layer."""
        if self.state() is None or self.state().estimates is None:
            return None
        rows, found = self._rows(out), self.state().estimates
        return self._laid_out(rows.new_zeros(found.total, rows.shape[1]).index_copy(0, found.kept, rows), out)

    def _after(self, k: int, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        """After a layer: the patches that stayed, or all patches where features are read."""
        if self.state() is None or self.state().estimates is None:
            return None
        rows = self._trim(out) if self._long(out) else out
        return self._fill(rows) if k in self.encoder.feature_layers else rows

    def _tapped(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Before a merger of DeepStack, which reads a layer in between: all patches."""
        state = self.state()
        if state is None or state.estimates is None or self._long(args[0]):
            return None
        return (self._fill(args[0]), *args[1:]), kwargs
