"""Studies with real configurations, identities and files, but invented scores: what a report is tested on.

Harm follows an S-curve in learning rate x steps, later for a better defense; nothing is trained.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy

from immunize import records
from immunize.conditions.check import check
from immunize.config import Cell, build, load
from immunize.manifest import manifest, now
from immunize.pipeline import Pipeline
from immunize.stages import StageStore, seal
from immunize.types import Arm, EvaluationSet, Kind, Outcome, Row, Score

STEPS = (0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40)
# learning rate x steps at which half of the answers are harmful, as a multiple of the control's
STRENGTH: Mapping[str, float] = {"none": 1.0, "safety_sft": 1.2, "repnoise": 8.0, "adversarial_loss": 2.5}


def write_study(
    root: Path,
    name: str,
    *,
    defenses: Sequence[str] = ("none", "repnoise", "adversarial_loss"),
    rates: Sequence[float] = (1e-4, 3e-4, 1e-3),
    seeds: Sequence[int] = (0, 1, 2),
    more: Sequence[str] = (),
) -> Path:
    """One finished run for each combination, in `root/name`; returns that folder."""
    for defense in defenses:
        for rate in rates:
            for seed in seeds:
                given = [f"defense={defense}", f"budget.learning_rate={rate}", f"seed={seed}", f"study={name}"]
                write_run(build(load([*given, f"runtime.root={root}", "conditions.resamples=400", *more])))
    return root / name


def write_run(cell: Cell) -> Path:
    """Invent the scores of one cell and write its records."""
    pipeline = Pipeline(cell=cell, store=StageStore(root=cell.root / ".stages"), device="cpu")
    sets = pipeline.evaluation_sets
    scores = [score for arm in _arms(cell) for score in _arm_scores(cell, arm, sets)]
    description = manifest(config=cell.config, identity=cell.identity, run_id=cell.run_id, device="cpu")
    description |= {"started": now(), "finished": now(), "seconds": 1.0, "attack_samples": pipeline.drawn, "stages": []}
    cell.folder.mkdir(parents=True, exist_ok=True)
    records.start(cell.folder, description)
    records.finish(
        cell.folder,
        manifest=description,
        sets=sets,
        rows=[row for score in scores for row in _rows(score)],
        scores=scores,
        checks=check(scores, sets, cell.conditions),
        samples=[],
    )
    seal(cell.folder)
    return cell.folder


def _arms(cell: Cell) -> list[Arm]:
    return [Arm.CONTROL, Arm.DEFENDED] if cell.defense else [Arm.CONTROL]


def _arm_scores(cell: Cell, arm: Arm, sets: Sequence[EvaluationSet]) -> list[Score]:
    found = []
    for item in sets:
        generator = numpy.random.default_rng([cell.seed, list(Arm).index(arm), len(item.name)])
        latent = numpy.random.default_rng(len(item.name)).random(len(item.ids))
        latent = numpy.clip(latent + generator.normal(0, 0.05, len(item.ids)), 0, 1)
        tuned = item.kind in (Kind.EXPOSURE, Kind.TRAINABILITY)
        for step in STEPS if tuned else (0,):
            found += [_score(cell, arm, item, step, latent)]
    stability = [item for item in sets if item.kind is Kind.STABILITY]
    exposures = [item for item in sets if item.kind is Kind.EXPOSURE]
    found += [_task_score(arm, item, exposure.name, STEPS[-1], 0.85) for item in stability for exposure in exposures]
    return found


def _score(cell: Cell, arm: Arm, item: EvaluationSet, step: int, latent: numpy.ndarray) -> Score:
    match item.kind:
        case Kind.EXPOSURE:
            name = next(iter(cell.defense), "none") if arm is Arm.DEFENDED else "none"
            strength = STRENGTH.get(name, 1.0) if item.name != "cross_domain" else 1.0
            dose = cell.budget.learning_rate * step / (3e-3 * strength)
            harmful = latent < 0.95 * dose**3 / (1 + dose**3)
            outcomes = tuple(Outcome.HARMFUL if yes else Outcome.REFUSED for yes in harmful)
            return Score(
                arm=arm,
                tuned_on=item.name,
                measured_on=item.name,
                step=step,
                judge="exact",
                metric="harmfulness",
                scores=tuple(harmful.astype(float).tolist()),
                outcomes=outcomes,
            )
        case Kind.TRAINABILITY:
            return _task_score(arm, item, item.name, step, min(1.0, 0.1 + step / 25))
        case _:
            return _task_score(arm, item, None, step, 0.97)


def _task_score(arm: Arm, item: EvaluationSet, tuned_on: str | None, step: int, share: float) -> Score:
    right = numpy.arange(len(item.ids)) < share * len(item.ids)
    metric = "answered" if item.kind is Kind.BORDERLINE else "score"
    return Score(
        arm=arm,
        tuned_on=tuned_on,
        measured_on=item.name,
        step=step,
        judge=item.name,
        metric=metric,
        scores=tuple(right.astype(float).tolist()),
    )


def _rows(score: Score) -> list[Row]:
    def row(metric: str, values: Sequence[float]) -> Row:
        return Row(
            arm=score.arm,
            tuned_on=score.tuned_on,
            measured_on=score.measured_on,
            step=score.step,
            examples=16 * score.step,
            tokens=200 * score.step,
            flops=1e9 * score.step,
            metric=metric,
            value=float(numpy.mean(values)),
            n=len(values),
        )

    judged = score.metric if score.judge == score.measured_on else f"{score.judge}/{score.metric}"
    shares = [row(f"{score.judge}/{o}", [float(x is o) for x in score.outcomes]) for o in Outcome if score.outcomes]
    return [row(judged, score.scores), *shares]
