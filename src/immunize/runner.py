"""From a built configuration to a finished run: claim, run the pipeline, check, record, mirror."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

from immunize import records
from immunize.config import Cell
from immunize.data.notices import notices, readings
from immunize.manifest import manifest, now
from immunize.progress import Progress
from immunize.records import Run, RunFailedError
from immunize.stages import BusyError, Event, Planner, StageStore, seal
from immunize.validation import check_hardware


def execute(cell: Cell) -> Run:
    """Run one cell, or read it back when it is finished. Raises RunFailedError when a stage fails."""
    with Progress(enabled=cell.runtime.progress) as progress:
        return attempt(cell, progress=progress, store=StageStore(root=cell.root / ".stages", announce=progress.say))


def attempt(cell: Cell, *, progress: Progress, store: StageStore) -> Run:
    """`execute` with the store of a caller that goes through many cells.

    A store that does not wait makes this raise BusyError where another process is at work on the run or a stage of it.
    """
    folder = cell.folder
    with records.claim(folder, announce=progress.say, wait=store.wait):
        if records.is_finished(folder):
            problem = records.flaw(folder)
            if problem is None:
                progress.say(f"run {cell.run_id} of study {cell.study} is finished already; nothing to do")
                finished = records.read(folder, checked=True)
                for key in ("figure", "tracking"):
                    if finished.manifest["config"][key] != cell.config[key]:
                        progress.say(f"{key} stays as it was; remove {folder} to have it made again from the stages")
                return finished
            progress.say(f"run {cell.run_id}: {problem}; its records are written again")
        device = choose_device(cell.runtime.device)
        check_hardware(cell, device)
        description = manifest(config=cell.config, identity=cell.identity, run_id=cell.run_id, device=device)
        description["started"] = now()
        data = datasets(cell)
        for line in notices(data):
            progress.say_once(line)
        if found := readings(data):
            description["data"] = found
        description["stages"] = []
        try:
            description["stages"] = [_stage(event) for event in plan(cell, device=device)]
            records.start(folder, description)
            _run(cell, folder, progress, device, description, store)
            return records.read(folder)
        except Exception as error:
            if isinstance(error, BusyError):
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            where = f"traceback in {folder / records.ERROR}"
            try:
                records.fail(folder, error, manifest=description)
                _mirror_failure(cell, description, message, progress)
            except OSError as second:
                where = f"{records.ERROR} could not be written: {second.strerror}"
            raise RunFailedError(f"run {cell.run_id} failed at [{progress.last}]: {message} ({where})") from error


def plan(cell: Cell, *, device: str) -> list[Event]:
    """The stages of one cell, in order, without running any; those that are there already are `reused`."""
    from immunize.pipeline import Pipeline

    store = Planner(root=cell.root / ".stages")
    Pipeline(cell=cell, store=store, device=device).request()
    return list({event.id: event for event in store.events}.values())


def datasets(cell: Cell) -> list[Any]:
    """The domains and tasks that a run reads."""
    tasks = [*cell.task.all(), cell.task.retain, cell.task.direct_requests, cell.attack.task]
    return [item for item in (cell.data.domain, cell.data.other_domain, *tasks) if item is not None]


def _run(
    cell: Cell, folder: Path, progress: Progress, device: str, description: dict[str, Any], store: StageStore
) -> None:
    import torch

    from immunize.conditions.check import check
    from immunize.pipeline import Pipeline

    torch.set_num_threads(cell.runtime.threads)
    begun = time.perf_counter()
    pipeline = Pipeline(cell=cell, store=store, device=device, progress=progress.bar)
    results = pipeline.run()
    progress.say("check the conditions")
    checks = check(results.scores, results.sets, cell.conditions)
    description["finished"] = now()
    description["seconds"] = round(time.perf_counter() - begun, 3)
    description["attack_samples"] = pipeline.drawn
    if results.mixtures:
        description["mixtures"] = results.mixtures
    if results.judged_by:
        description["judged_by"] = results.judged_by
    if results.benchmarks:
        description["benchmarks"] = results.benchmarks
    description["stages"] = [_stage(event) for event in store.events]
    records.finish(
        folder,
        manifest=description,
        sets=results.sets,
        rows=results.rows,
        scores=results.scores,
        checks=checks,
        samples=results.samples,
    )
    run = Run(
        path=folder,
        manifest=description,
        sets=results.sets,
        rows=results.rows,
        scores=results.scores,
        checks=checks,
    )
    figure = folder / records.FIGURE
    progress.say("draw the figure")
    draw(run, figure, kind=cell.figure)
    progress.say("mirror the records")
    try:
        cell.tracking.mirror(run, tags=_tags(cell), figure=figure)
    except Exception as error:  # the records are complete without it
        progress.say(f"W&B could not be written: {error}")
    seal(folder)
    reused = Counter(event.reused for event in store.events)
    progress.say(f"{reused[False]} stages run, {reused[True]} reused, {time.perf_counter() - begun:.0f} s")


def _mirror_failure(cell: Cell, description: dict[str, Any], reason: str, progress: Progress) -> None:
    """Tell W&B too; the records are complete without it."""
    try:
        shown = reason.replace(str(Path.home()), "~")
        cell.tracking.mirror_failure(cell.folder, config=description["config"], tags=_tags(cell), reason=shown)
    except Exception as error:
        progress.say(f"W&B could not be written: {error}")


def choose_device(wanted: str) -> str:
    """`auto` is a GPU where there is one."""
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("runtime.device=cuda: torch sees no GPU here; use runtime.device=cpu")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def draw(run: Run, path: Path, *, kind: str) -> None:
    """The picture of a run: its curves, or the layout of the paper's Figure 2."""
    from immunize.report.figure import draw_curves
    from immunize.report.paper_figure import draw_paper_figure

    (draw_paper_figure if kind == "paper_figure_2" else draw_curves)(run, path)


def _stage(event: Any) -> dict[str, Any]:
    timing = {"seconds": round(event.seconds, 3), "steps": event.work.steps, "answers": event.work.answers}
    return {"kind": event.kind, "id": event.id, "label": event.label, "reused": event.reused, **timing}


def _tags(cell: Cell) -> list[str]:
    defense = list(cell.defense) or ["none"]
    return [*(f"defense={name}" for name in defense), f"attack={cell.attack.name}", f"seed={cell.seed}"]
