"""`vtoken calibrate fitprune`: the search against its definition, and the table it writes."""

from __future__ import annotations

import pytest
import tiny
import torch
from watchers import dense, where

import vtoken
from vtoken import config
from vtoken.cli import main
from vtoken.errors import ConfigError
from vtoken.evals.calibrate import _fitprune as search
from vtoken.evals.cost.flops import account
from vtoken.evals.cost.geometry.decoder import decoder


def test_what_can_be_removed():
    values = torch.tensor([3.0, 1, 4, 2])
    for floor, gone in (
        (10, []),
        (9.5, []),
        (9, [1]),
        (7.5, [1]),
        (7, [1, 3]),
        (4, [0, 1, 3]),
        (0.1, [0, 1, 3]),
        (11, []),
    ):
        assert search.removable(values, floor).nonzero()[:, 0].tolist() == gone, floor
    assert search.removable(torch.ones(3), 2).tolist() == [True, False, False]


def test_the_schedule_stops_when_the_budget_is_met():
    stack = decoder(tiny.llava().config.get_text_config())
    alive = [[16, 8, 4, 2], [16, 12, 6, 2]]

    def share(*rows):
        return 1 - sum(search.forecast(stack, r) for r in rows) / (2 * search.forecast(stack, [16] * 4))

    once = share([16, 8, 8, 8], [16, 12, 12, 12])
    counts, spared = search.stopped(stack, alive, once)
    assert counts == [[16, 8, 8, 8], [16, 12, 12, 12]] and spared == once
    counts, spared = search.stopped(stack, alive, once + 1e-6)
    assert counts == [[16, 8, 4, 4], [16, 12, 6, 6]]
    counts, spared = search.stopped(stack, alive, 0.99)
    assert counts == alive and spared == share(*alive) < 0.99
    assert search.mean_losses(alive) == (6, 5, 3, 0), "4.5 + 1.5 and so on, rounded down"


def test_the_forecast_is_the_account():
    model = tiny.llava()
    text = model.config.get_text_config()
    stack = decoder(text)
    head = 2 * stack.width * text.vocab_size
    claimed = account(model.config, text_tokens=0, new_tokens=1)
    assert search.forecast(stack, [16] * 4) == claimed.prefill_linear - head + claimed.prefill_attention


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_a_layer_loses_what_both_attentions_spare(alpha):
    """Behind layer 0, where the pruned and the unpruned model are alike, from whole maps and by growing sets."""
    model = tiny.llava()
    batch = tiny.build(model, [[3, "img", 5]], seed=3)
    out, sample = dense(model, batch), search.Sample()
    for a in (None, alpha):
        sample.alive.clear()
        with vtoken.wrapped(model, [search.Losing(alpha=a, sample=sample)]), torch.no_grad():
            model(**batch)
        kept = sample.alive[1]
    ((_, columns, _, later),) = where(model, batch)
    most = out.attentions[0][0].double().amax(0)
    spared = []
    for mass in (most[later][:, columns].mean(0), most[columns][:, columns].mean(0)):
        gone: set[int] = set()
        for i in sorted(range(len(mass)), key=lambda i: float(mass[i])):
            if float(mass.sum() - mass[[*gone, i]].sum()) < (1 - alpha) * float(mass.sum()):
                break
            gone.add(i)
        spared.append(gone)
    assert kept == 16 - len(spared[0] & spared[1]) < 16


def test_fit():
    """More reduction, more leaves; the table is what a pipeline can run, and it does leave so many."""
    model = tiny.llava()
    prompts = [tiny.build(model, [[3, "img", 5]], seed=s) for s in (1, 2)]
    mild, hard = (search.fit(model, prompts, share) for share in (0.15, 0.4))
    assert mild.reached >= 0.15 and hard.reached >= 0.4 and mild.alpha < hard.alpha
    assert sum(mild.table) < sum(hard.table) < 16 and hard.table[-1] == 0 and hard.spared <= hard.reached + 1e-9
    with vtoken.wrapped(model, [{"fitprune": {"table": list(hard.table), "tokens": hard.tokens}}]), torch.no_grad():
        model(**prompts[0])
        alive = [sum(counts) for counts in vtoken.trace(model).layers]
    assert alive == [16 - sum(hard.table[:k]) for k in range(4)]
    with pytest.raises(ConfigError, match="cannot be reached"):
        search.fit(model, prompts, 0.95)
    with pytest.raises(ConfigError, match="one picture each"):
        search.fit(model, [tiny.build(model, [[3, "img", 5, "img", 2]], seed=1)], 0.2)


def test_pictures_of_two_sizes_are_refused():
    model = tiny.make("qwen2_vl")
    given = [tiny.build(model, [[3, picture, 5]], seed=1) for picture in (("img", (1, 8, 8)), ("img", (1, 4, 4)))]
    with pytest.raises(ConfigError, match="4 to 16 visual tokens"):
        search.fit(model, given, 0.2)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "table.yaml"
    assert main(["calibrate", "fitprune", "tiny-llava", "--reduction", "40", "--limit", "1", "--out", str(out)]) == 0
    assert "wrote" in capsys.readouterr().out
    (stage,) = config.load(out).stages
    assert stage.tokens == 576 and len(stage.table) == 4 and out.read_text().startswith("# FitPrune")


def test_without_questions_nothing_is_loaded(capsys):
    assert main(["calibrate", "fitprune", "tiny-llava", "--reduction", "40", "--limit", "0"]) == 2
    assert "--limit must be at least 1" in capsys.readouterr().err
    assert main(["calibrate", "fitprune", "tiny-llava", "--reduction", "40", "--data", "nowhere.jsonl"]) == 2
    assert "no data 'nowhere.jsonl'" in capsys.readouterr().err
