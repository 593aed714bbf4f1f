"""Optuna trials that raise quality and lower cost. A trial whose first samples are poor stops early; a study can be
resumed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

import vtoken
from vtoken import config
from vtoken.config import Pipeline
from vtoken.errors import ConfigError, UnsupportedError, VtokenError
from vtoken.evals.shared.bars import say
from vtoken.evals.shared.options import Workload
from vtoken.evals.tune.cost import Objective, share
from vtoken.evals.tune.quality import Judge
from vtoken.evals.tune.space import Space


@dataclass
class Search:
    """One study.

    Attributes:
        like: the prefill whose cost is taken.
        keep: share of the dense model's quality that the best pipeline must keep.
        first: samples after which a trial may be stopped, if its quality there is below the floor and below the median
            of all trials before it. Whatever the number, one that cannot reach the floor any more is stopped.
        about: what else decides the numbers; a study of another one is not gone on with.
    """

    judge: Judge
    space: Space
    folder: Path
    like: Workload
    objective: Objective
    keep: float
    first: int
    seed: int
    about: dict[str, Any]
    study: optuna.Study = field(init=False)

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        storage = f"sqlite:///{(self.folder / 'study.db').resolve()}"
        self.study = optuna.create_study(
            storage=storage, study_name="vtoken", directions=["maximize", "minimize"], load_if_exists=True
        )
        settings = {"objective": self.objective, "quality": self.judge.measure, "keep": self.keep, "first": self.first}
        given = {"shape": self.shape, "space": self.space.model_dump(mode="json"), "vtoken": vtoken.__version__}
        own = json.loads(json.dumps({**self.about, **settings, **given}, sort_keys=True, default=str))
        known = self.study.user_attrs.get("about", own)
        if known != own and self._tried():
            other = ", ".join(key for key in own if known.get(key) != own[key])
            raise ConfigError(f"{self.folder} holds a study with another {other}; give another folder with --out")
        self.study.set_user_attr("about", own)
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):  # It was killed.
            self.study.tell(trial.number, state=TrialState.FAIL)
        # Not the draws of the trials that are there already.
        self.study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(self.study.trials))

    @property
    def shape(self) -> dict[str, Any]:
        return self.like.model_dump(exclude={"new_tokens"})

    @property
    def floor(self) -> float:
        return self.keep * self.judge.dense

    def run(self, trials: int) -> None:
        """Goes on until there are so many trials, those of earlier calls counted.

        Raises:
            VtokenError: a model that can serve none of the drawn pipelines.
            Whatever the model raises: the trials before stay in the study.
        """
        floor = self.floor  # The dense model answers first.
        for done in range(len(self._tried()), trials):
            trial = self.study.ask()
            pipeline = self.space.suggest(trial)
            trial.set_user_attr("pipeline", config.dump(pipeline))
            say(f"{done} of {trials} trials, {pipeline.name}", done / trials)
            try:
                cost = share(self.judge.generator, pipeline, self.objective, self.like)
                quality = self._quality(trial, pipeline, floor)
            except UnsupportedError as error:
                trial.set_user_attr("refused", str(error))
                quality = None
            if quality is None:
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                self.study.tell(trial, [quality, cost])
        reasons = [t.user_attrs.get("refused") for t in self._tried()]
        if all(reasons):
            raise VtokenError(f"the model can serve none of the pipelines tried: {reasons[0]}")

    def _tried(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or (TrialState.COMPLETE, TrialState.PRUNED))

    def _quality(self, trial: optuna.Trial, pipeline: Pipeline, floor: float) -> float | None:
        """Mean score, None where the trial was stopped; `stopped` then says why, `first` what was seen until then."""
        total, most = len(self.judge.samples), self.judge.most
        before = [t.user_attrs["first"] for t in self._tried() if "first" in t.user_attrs]
        scores: list[float] = []
        stream = self.judge.scores(pipeline)
        try:
            for batch in stream:
                early = len(scores) < self.first
                scores += batch
                mean, why = sum(scores) / len(scores), ""
                if early and len(scores) >= self.first:
                    trial.set_user_attr("first", mean)
                    if before and mean < min(floor, median(before)):
                        why = "below the median"
                if (sum(scores) + sum(most[len(scores) :])) / total < floor:
                    why = why or "cannot reach the floor"
                if why and len(scores) < total:
                    trial.set_user_attr("stopped", f"{mean:.3f} after {len(scores)} samples, {why}")
                    return None
        finally:
            stream.close()
        if self.judge.relative is not None:
            trial.set_user_attr("tasks", self.judge.relative.values)
        return self.judge.quality(scores)

    def to_dict(self) -> dict[str, Any]:
        """Everything that was tried, in order. `best` numbers trials, the cheapest at or above the floor first,
        `no_gain` those that were no cheaper than dense. `dense`, and `tasks` of a trial, are the tasks' own metrics
        where those are kept."""
        trials = [
            {
                "number": t.number,
                "quality": t.values[0] if t.values else None,
                "cost": t.values[1] if t.values else None,
                **{key: t.user_attrs.get(key) for key in ("first", "stopped", "refused", "tasks", "pipeline")},
            }
            for t in self._tried()
        ]
        about = self.study.user_attrs["about"]
        dense = None if self.judge.relative is None else self.judge.relative.base
        found = {"schema": "vtoken-tune/1", "about": about, "floor": self.floor, "dense": dense}
        best, no_gain = ([t.number for t in some] for some in (self.best(), self.no_gain()))
        return {**found, "best": best, "no_gain": no_gain, "trials": trials}

    def no_gain(self) -> list[FrozenTrial]:
        """Trials that cost as much as the dense model or more, which are never recommended."""
        return [t for t in self._tried(TrialState.COMPLETE) if t.values[1] >= 1]

    def best(self) -> list[FrozenTrial]:
        """The Pareto front below dense's cost: first those at or above the floor, cheapest first, then the others, best
        first."""
        gains = (t for t in self.study.best_trials if t.values[1] < 1)
        front = {t.values[0]: t for t in sorted(gains, key=lambda t: -t.number)}.values()
        good = sorted((t for t in front if t.values[0] >= self.floor), key=lambda t: t.values[1])
        return good + sorted((t for t in front if t.values[0] < self.floor), key=lambda t: -t.values[0])

    def write(self) -> list[Path]:
        """tune.json, and a pipeline file for every trial of the front: best-1.yaml is the one to take if it reaches the
        floor."""
        (self.folder / "tune.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        for old in self.folder.glob("best-*.yaml"):
            old.unlink()
        files = []
        for k, trial in enumerate(self.best(), start=1):
            quality, cost = trial.values
            kept = "at or above" if quality >= self.floor else "below"
            own = "".join(f"; {name} {value:.6g}" for name, value in (trial.user_attrs.get("tasks") or {}).items())
            head = (
                f"# vtoken tune on {self.about.get('model')}: {self.judge.measure} {quality:.4f} on "
                f"{len(self.judge.samples)} samples (dense {self.judge.dense:.4f}), {kept} the floor {self.floor:.4f}; "
                f"{self.objective} {cost:.4f} of dense{own}\n"
            )
            files.append(self.folder / f"best-{k}.yaml")
            files[-1].write_text(head + trial.user_attrs["pipeline"], encoding="utf-8")
        return files
