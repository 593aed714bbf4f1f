"""What the README says is so: its size, its figures, its commands."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import vtoken
from vtoken import config, registry
from vtoken.evals.cost.flops import account
from vtoken.evals.shared.configs import resolve_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def rows(head: str) -> list[list[str]]:
    """The rows of the table whose first column is called so."""
    (table,) = re.findall(rf"^\| {head} \|.*\n\| -.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().split("\n")]


def test_it_is_read_at_one_sitting() -> None:
    assert len(README.splitlines()) <= 125 and len(README) < 8000


def test_figures_of_the_7b_are_those_of_the_account() -> None:
    table = README.partition("**On a 7B.**")[2].partition("**On the model")[0]
    shape = resolve_config("llava-hf/llava-1.5-7b-hf")
    dense = account(shape, None, text_tokens=64, new_tokens=64)
    assert f"{dense.total / 1e12:.3f} T | {dense.kv_bytes_prefill / 1e6:.1f} MB" in table
    for name in ("fastervlm-192", "fastervlm-64"):
        found = account(shape, config.load(name), text_tokens=64, new_tokens=64)
        flops = f"{found.total / 1e12:.3f} T ({100 * found.total / dense.total:.1f} %)"
        share = 100 * found.kv_bytes_prefill / dense.kv_bytes_prefill
        assert f"| {name} | {flops} | {found.kv_bytes_prefill / 1e6:.4g} MB ({share:.1f} %) |" in table


def test_measured_rows_stand_in_the_results() -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    measured = re.findall(r"^\| (?:dense|\w+:\d+) \| \d+ \|.*$", README, re.MULTILINE)
    assert len(measured) == 5 and all(row in results for row in measured)


def test_methods_to_start_with_are_there_with_their_figures() -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert len(registry.stages()) > 80 and "More than 80 stages" in README
    named = {row[0].strip("`"): row[1] for row in rows("stage")}
    assert len(named) == 5 and {*named} <= {*registry.stages()}
    for name, why in named.items():
        (share,) = re.findall(r"([\d.]+) %", why)
        assert any(share in line for line in results.splitlines() if line.startswith(f"| {name}")), name


def test_badges_and_citation_say_what_the_project_says() -> None:
    assert f"licence: {PROJECT['license']}" in README
    assert f"python: {PROJECT['requires-python'].removeprefix('>=')}+" in README
    (needed,) = [line for line in PROJECT["dependencies"] if line.startswith("transformers")]
    assert needed == "transformers>=5.14,<6" and "transformers: 5.14 to 5.x" in README
    for name, value in re.findall(r"!\[(\w+): (.*?)\]\(docs/pictures", README):
        assert f'aria-label="{name}: {value}"' in (ROOT / "docs" / "pictures" / f"{name}.svg").read_text("utf-8")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["version"], cited["license"]) == (vtoken.__version__, PROJECT["license"])


def test_its_commands_are_those_of_ci_and_the_makefile() -> None:
    asked = {*re.findall(r"^make ([\w-]+)", README, re.MULTILINE)}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert asked == {"demo", "test"} <= {*targets}
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_extras_that_are_named_exist() -> None:
    (line,) = re.findall(r"^Other extras: .*$", README, re.MULTILINE)
    named = {name for name in re.findall(r"`([\w-]+)`", line)} | {"plot"}
    assert named == {*PROJECT["optional-dependencies"]} - {"int8"}


def test_nobody_is_sent_to_an_index_that_does_not_hold_vtoken() -> None:
    """`pip install vtoken` would find nothing, or somebody else's package."""
    texts = [*(ROOT / "vtoken").rglob("*.py"), ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    asked = re.compile(r"pip install [^`\n]*vtoken(?:\[[\w,-]+\])?(?! @)(?=[\s\"'`])")
    assert asked.search('pip install "vtoken[plot]"') and not asked.search('pip install "vtoken[plot] @ git+URL"')
    assert not [str(file) for file in texts if asked.search(file.read_text(encoding="utf-8"))]
