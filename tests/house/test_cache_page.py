"""docs/cache.md names every stage that makes the cache smaller or reads less of it, with the figures of the account."""

from __future__ import annotations

from pathlib import Path

from vtoken import registry
from vtoken.config import load
from vtoken.errors import VtokenError
from vtoken.evals.cost.flops import Account, account
from vtoken.evals.shared.configs import resolve_config
from vtoken.stages import CacheStage, Stage

PAGE = (Path(__file__).parents[2] / "docs" / "cache.md").read_text(encoding="utf-8")
MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
WORK = {"image_size": 448, "frames": 64, "text_tokens": 64, "new_tokens": 256}
SITES = ("cache", "decode")
BESIDE = ("kvpress:press=KnormPress,compression_ratio=0.5",)  # stages without a preset
FEW = 0.95  # of dense, below which a cache counts as smaller, a step as reading less


def pipelines() -> list[str]:
    """Presets of these sites, and what has none."""
    return [name for name in (*registry.presets(), *BESIDE) if any(s.site in SITES for s in stages(name))]


def stages(name: str) -> tuple[Stage, ...]:
    try:
        return load(name).stages
    except VtokenError:
        return ()


def line(name: str, dense: Account) -> str:
    found = account(resolve_config(MODEL), load(name), **WORK)
    (acting,) = [s for s in load(name).stages if s.site in SITES]
    shares = [getattr(found, f) / getattr(dense, f) for f in ("kv_bytes_prefill", "kv_bytes", "kv_bytes_read")]
    # A cache in few bits is worked out at full width at every step.
    packed = isinstance(acting, CacheStage) and acting.packed_bytes(1000, (900,), 4, 128, 2) is not None
    memory, reading = shares[1] < FEW, shares[2] < FEW and not packed
    upper = "at most " if acting.name in found.inexact else ""
    serves = "both" if memory and reading else "memory" if memory else "reading" if reading else ""
    serves = serves or ("longer videos" if isinstance(acting, CacheStage) and not upper else "what it sees decides")
    return f"| {acting.name} | {name} | {' | '.join(f'{upper}{share:.1%}' for share in shares)} | {serves} |"


def rows() -> list[str]:
    return [
        each
        for each in PAGE.partition("<!-- caches -->\n")[2].partition("<!-- /caches -->")[0].splitlines()[2:]
        if each
    ]


def test_the_table_is_that_of_the_account() -> None:
    """If it fails: the rows are those that the message shows."""
    dense = account(resolve_config(MODEL), **WORK)
    wanted = sorted(line(name, dense) for name in pipelines())
    assert rows() == wanted, "\n".join(wanted)


def test_every_stage_of_these_sites_is_there() -> None:
    named = {row.split("|")[1].strip() for row in rows()}
    of_cache = {name for name in registry.stages() if registry.stage(name).site in SITES}
    assert of_cache == named
