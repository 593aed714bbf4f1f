"""The needle benchmark: which pipelines it asks, and that it runs to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vtoken import registry
from vtoken.config import load

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import needle  # noqa: E402


def test_every_preset_of_these_sites_is_asked() -> None:
    """New stages join by their presets; those that have none are named beside."""
    asked = list(needle.pipelines())
    names, stages = [each.name for each in asked], {stage.name for each in asked for stage in each.stages}
    assert len(set(names)) == len(names)
    assert set(needle.BESIDE) | {"snapkv-64", "lookm-20"} <= set(names) and "fastervlm-64" not in names
    preset = {stage.name for name in registry.presets() for stage in _stages(name)}
    assert {name for name in preset if registry.stage(name).site in needle.SITES} <= stages


def _stages(preset: str) -> tuple:
    try:
        return load(preset).stages
    except ValueError:
        return ()


def test_no_stage_waits_for_a_longer_prompt() -> None:
    (stage,) = needle.short(load("flexprefill-90")).stages
    assert stage.min_len == 0 < load("flexprefill-90").stages[0].min_len
    assert needle.short(load("snapkv-64")).stages == load("snapkv-64").stages


def test_the_table_counts_what_was_right() -> None:
    dense, own = needle.Answers(None), needle.Answers(load("snapkv-64"))
    for one, right, size in ((dense, True, 400), (own, False, 100)):
        one.right = {(8, 0): [True], (8, 100): [right], (16, 0): [right]}
        one.cached = {8: [size], 16: [size]}
    refused = needle.Answers(load("lookm-20"), refused="why")
    head, _, first, second = needle.table([dense, own, refused], [8, 16]).splitlines()
    assert head == "| pipeline | 8 frames | 16 frames | all | cache at 16 | attention at 16 |"
    assert first.startswith("| dense | 100% | 100% | 100.0% (") and first.endswith("| 100.0% |  |")
    assert second.startswith("| snapkv-64 | 50% | 0% | 33.3% (") and second.endswith("| 25.0% |  |")


def test_titles_of_maps_do_not_overlap(tmp_path: Path) -> None:
    asked = ["static_sparse:sink=64,window=256,size=64", "flexprefill:gamma=0.9,tau=0.1,min_budget=128,size=64"]
    found = [needle.Answers(None), *(needle.Answers(load(each)) for each in asked * 2)]
    for one in found:
        one.right = {(n, depth): [True, False] for n in (8, 16) for depth in needle.DEPTHS}
    figures: list = []
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "close", figures.append)
        needle.draw(found, [8, 16], tmp_path / "maps.png")
    (figure,) = figures
    boxes = [axis.title.get_window_extent() for axis in figure.axes]
    assert not [1 for at, box in enumerate(boxes) for other in boxes[:at] if box.overlaps(other)]
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert {text.get_text() for text in figure.axes[0].texts} == {"50%"}
    pyplot.close(figure)


def test_it_runs_and_the_model_finds_the_digits(tmp_path: Path) -> None:
    """Eight frames, once at every depth; a stage that cannot run says why."""
    command = [sys.executable, str(ROOT / "benchmarks" / "needle.py"), "snapkv-64", "proxyattn-4", "flexprefill-90"]
    files = ["--json", str(tmp_path / "found.json"), "--out", str(tmp_path / "maps.png")]
    options = ["--lengths", "8", "--each", "1", "--threads", "1", *files]
    child = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "| dense | " in child.stdout and "proxyattn-4 did not run: " in child.stdout
    rows = {row["pipeline"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert sum(sum(each) for each in rows["dense"]["right"].values()) >= 4, "of five; all here"
    assert rows["snapkv-64"]["held"]["8"][0] < rows["dense"]["held"]["8"][0]
    assert 0 < rows["flexprefill-90"]["density"]["8"][0] <= 1 and rows["proxyattn-4"]["refused"]
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
