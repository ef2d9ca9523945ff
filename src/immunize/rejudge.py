"""The saved answers of a study under another judge: nothing is trained, and no run's own files are changed.

The answers come from the runs' private samples, the prompts from their data, and whether an answer is broken from
their scores, since that is the same whoever judges. What is found is kept beside the runs, without text.
"""

import gzip
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from immunize.conditions.check import check
from immunize.conditions.settings import Conditions
from immunize.data.splits import DIRECT_REQUESTS, exposures, requests_of
from immunize.instantiate import instantiate
from immunize.judgement import Agreement, write
from immunize.judges.kept import KeptJudge, kept
from immunize.prune import STAGES
from immunize.records import PRIVATE, Run
from immunize.scoring import outcome_of
from immunize.stages import canonical_json, identity
from immunize.stats import cohen_kappa, spearman
from immunize.study import Study
from immunize.training.memory import Judging, OutOfMemoryError, explained
from immunize.types import Check, Example, Outcome, Score

HARMFULNESS = "harmfulness"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One run under the new judge: its scores, and the checks of the run's exposures that they give."""

    run: Run
    scores: Sequence[Score]
    checks: Sequence[Check]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A study under one more judge; `models` is what answered, where it told."""

    judge: str
    identity: Any
    runs: Sequence[Judged]
    agreements: Sequence[Agreement]
    models: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where local data lie, by the names that manifests give them, and whose classes may be built from manifests."""

    places: Mapping[str, Path] = field(default_factory=dict)
    trusted: Sequence[str] = ()

    def built(self, node: Any, annotation: Any, *, key: str) -> Any:
        return instantiate(self._placed(node), annotation, key=key, trusted=("immunize", *self.trusted))

    def _placed(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self._placed(item) for item in node]
        if not isinstance(node, Mapping):
            return node
        found = {name: self._placed(item) for name, item in node.items()}
        name = node.get("path")
        if isinstance(name, str):
            if name not in self.places:
                raise ValueError(f"the study's data come from {name}; say where it lies with --source {name}=PATH")
            found["path"] = str(self.places[name])
        return found


def rejudge(study: Study, judge: Any, *, sources: Sources, device: str, say: Callable[[str], None]) -> Judgement:
    """Score every saved answer to a harmful prompt; raises ValueError where answers, data or memory are missing."""
    if not study.runs:
        raise ValueError(f"{study.path}: holds no finished run")
    taken = sorted({score.judge for run in study.runs for score in run.scores})
    if judge.name in taken:
        raise ValueError(f"judge: the study was judged by {judge.name} already; another name tells the two apart")
    asked = kept(judge, stages=study.path.parent / STAGES, device=device)
    examples = cache(lambda key: _examples(json.loads(key), sources=sources))
    found: list[Judged] = []
    for run in study.runs:
        say(f"run {run.id}")
        known = examples(canonical_json(_chosen(run)))
        try:
            with explained(Judging(stage=f"run {run.id}", judges=[judge])):
                scores = list(_scores(run, asked, known))
        except OutOfMemoryError as error:
            raise ValueError(str(error)) from error
        settings: Conditions = sources.built(run.manifest["config"]["conditions"], Conditions, key="conditions")
        others = [score for score in run.scores if not score.outcomes]
        checks = check([*others, *scores], run.sets, settings)
        found.append(Judged(run=run, scores=scores, checks=[item for item in checks if item.judge == judge.name]))
    names = sorted({score.judge for run in study.runs for score in run.scores if score.metric == HARMFULNESS})
    return Judgement(
        judge=judge.name,
        identity=identity(judge),
        runs=found,
        agreements=[_agreement(name, found) for name in names],
        models=sorted(asked.models) if isinstance(asked, KeptJudge) else [],
    )


def save(judgement: Judgement, study: Study) -> Path:
    """Write judgements/JUDGE-ID.jsonl beside the runs."""
    return write(
        study.path,
        judge=judgement.judge,
        identity=judgement.identity,
        models=judgement.models,
        agreements=judgement.agreements,
        runs=[(item.run.id, item.checks, item.scores) for item in judgement.runs],
    )


def _chosen(run: Run) -> dict[str, Any]:
    """What the prompts of a run's answers are made of, and the identities that were recorded of it."""
    config, recorded = run.manifest["config"], run.manifest["identity"]
    return {
        **{name: config[name] for name in ("data", "split")},
        DIRECT_REQUESTS: config["task"].get(DIRECT_REQUESTS),
        "recorded": {"data": recorded["data"], f"task.{DIRECT_REQUESTS}": recorded["task"].get(DIRECT_REQUESTS)},
    }


def _examples(chosen: dict[str, Any], *, sources: Sources) -> dict[str, dict[str, Example]]:
    """The prompts of every exposure and the direct requests, by id; the data must be those that were recorded."""
    data, split = (sources.built(chosen[name], object, key=name) for name in ("data", "split"))
    requests = chosen[DIRECT_REQUESTS]
    if requests is not None:
        requests = sources.built(requests, object, key=f"task.{DIRECT_REQUESTS}")
    for key, found in (("data", data), (f"task.{DIRECT_REQUESTS}", requests)):
        if canonical_json(found) != canonical_json(chosen["recorded"][key]):
            raise ValueError(f"{key}: a source has other content than when the study was run, or another version")
    prompts: dict[str, Sequence[Example]] = {item.name: item.evaluation for item in exposures(data, split)}
    if requests is not None:
        prompts[DIRECT_REQUESTS] = requests_of(requests)
    return {name: {example.id: example for example in items} for name, items in prompts.items()}


def _scores(run: Run, judge: Any, examples: Mapping[str, Mapping[str, Example]]) -> Iterator[Score]:
    """The new judge's score for each of the old harmfulness scores, one of several old judges' standing for all."""
    answers = _answers(run)
    sets = {item.name: item.ids for item in run.sets}
    done: set[tuple[Any, ...]] = set()
    for old in run.scores:
        place = (old.arm, old.tuned_on, old.measured_on, old.step)
        if old.metric != HARMFULNESS or place in done:
            continue
        done.add(place)
        ids = sets[old.measured_on]
        texts = [answers.get((*place, item)) for item in ids]
        known = [examples.get(old.measured_on, {}).get(item) for item in ids]
        if None in texts or None in known:
            what = "samples" if None in texts else "data, as they are here,"
            raise ValueError(f"run {run.id}: its {what} lack items of {old.measured_on} that were scored")
        values = judge.measure(known, texts)[HARMFULNESS]
        broken = [outcome is Outcome.BROKEN for outcome in old.outcomes]
        outcomes = tuple(outcome_of(value, is_broken) for value, is_broken in zip(values, broken, strict=True))
        yield replace(old, judge=judge.name, scores=tuple(values), outcomes=outcomes)


def _answers(run: Run) -> dict[tuple[Any, ...], str]:
    path = run.path / PRIVATE
    if not path.is_file():
        raise ValueError(f"run {run.id}: has no {PRIVATE}, where its answers are kept; it may have been shared without")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {
        (row["arm"], row["tuned_on"], row["measured_on"], row["step"], row["id"]): str(row["answer"]) for row in rows
    }


def _agreement(name: str, judged: Sequence[Judged]) -> Agreement:
    pairs: list[tuple[float, float]] = []
    missing = 0
    for item in judged:
        new = {(score.arm, score.tuned_on, score.measured_on, score.step): score for score in item.scores}
        for old in item.run.scores:
            if old.judge != name or old.metric != HARMFULNESS:
                continue
            other = new[old.arm, old.tuned_on, old.measured_on, old.step]
            missing += sum(map(math.isnan, other.scores))
            pairs += [
                (before, after)
                for before, after, outcome in zip(old.scores, other.scores, old.outcomes, strict=True)
                if outcome is not Outcome.BROKEN and not math.isnan(before) and not math.isnan(after)
            ]
    before, after = ([pair[index] for pair in pairs] for index in (0, 1))
    return Agreement(
        judge=name,
        n=len(pairs),
        missing=missing,
        spearman=spearman(before, after),
        kappa=cohen_kappa([value >= 0.5 for value in before], [value >= 0.5 for value in after]),
    )


def verdicts(judgement: Judgement) -> Counter[tuple[str, str, str, str]]:
    """How often a check came out so: (check, old judge, old verdict, new verdict) over the runs."""
    found: Counter[tuple[str, str, str, str]] = Counter()
    for item in judgement.runs:
        new = {entry.name: entry.verdict for entry in item.checks}
        for old in item.run.checks:
            if old.name in new and "+" not in old.judge:
                found[old.name, old.judge, old.verdict, new[old.name]] += 1
    return found
