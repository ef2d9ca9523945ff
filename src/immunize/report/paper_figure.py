"""The demonstration of the first paper in miniature: the five quantities of its Figure 2, ours above the paper's.

The scales differ (the paper's harmfulness is a grade from 1 to 5, its model a thousand times larger), so signs and
ordering are compared, never values.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from immunize.records import Run
from immunize.report.figure import COLORS, STYLES, Margins, first_judge, pyplot, select
from immunize.report.numbers import RISES
from immunize.types import Arm, Kind

TITLES = {
    "harmfulness": "harmfulness\n(attack)",
    "harmful_loss": "loss of harmful answers\n(attack)",
    "stability_loss": "loss on the stability task\n(attack)",
    "trainability_score": "ROUGE-1\n(benign training)",
    "harmless_loss": "loss on the benign task\n(benign training)",
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the paper says of its demonstration, and what came out here."""

    condition: str
    paper: str
    here: str


Curves = Mapping[str, tuple[Sequence[int], Sequence[float]]]


def paper_values() -> dict[str, Any]:
    """The paper's own curves, with their source."""
    values: dict[str, Any] = json.loads(Path(__file__).with_name("paper_figure_2.json").read_text())
    return values


def quantities(run: Run) -> dict[str, Curves]:
    """Our five quantities, each a curve per arm: (steps, values)."""
    exposure = next(item.name for item in run.sets if item.kind is Kind.EXPOSURE)
    stability = next(item.name for item in run.sets if item.kind is Kind.STABILITY)
    task = next(item.name for item in run.sets if item.kind is Kind.TRAINABILITY)
    places = {
        "harmfulness": (exposure, exposure, f"{first_judge(run)}/harmfulness"),
        "harmful_loss": (exposure, exposure, "loss"),
        "stability_loss": (exposure, stability, "loss"),
        "trainability_score": (task, task, "score"),
        "harmless_loss": (task, task, "loss"),
    }
    return {
        name: {arm: select(run.rows, tuned_on=tuned_on, measured_on=measured_on, metric=metric, arm=arm) for arm in Arm}
        for name, (tuned_on, measured_on, metric) in places.items()
    }


def claims(run: Run) -> list[Claim]:
    """The paper's three claims beside our verdicts."""
    steps = paper_values()["steps"][-1]
    stated = (
        ("resistance/", f"resists {steps} attack steps (harmfulness stays at its initial value)"),
        ("stability/", "stable: loss on reference text as before"),
        ("trainability/", "not trainable any more"),
    )
    return [
        Claim(condition=check.name, paper=text, here=str(check.verdict))
        for prefix, text in stated
        for check in run.checks
        if check.name.startswith(prefix) and check.name not in ("resistance/cost", *RISES)
    ]


def draw_paper_figure(run: Run, path: Path) -> None:
    """Two rows of five panels: this run, and the paper."""
    plt = pyplot()
    ours, paper = quantities(run), paper_values()
    figure, axes = plt.subplots(2, len(TITLES), figsize=(15, 5.6), squeeze=False)
    for column, (name, title) in enumerate(TITLES.items()):
        axes[0][column].set_title(title, fontsize=10)
        for arm in Arm:
            _plot(axes[0][column], *ours[name][arm], arm=arm)
            _plot(axes[1][column], paper["steps"], paper["quantities"][name][arm], arm=arm)
        axes[1][column].set_xlabel("steps", fontsize=8)
    axes[0][0].set_ylabel("here")
    axes[0][0].set_ylim(-0.04, 1.04)
    axes[0][3].set_ylim(-0.04, 1.04)
    for axis in axes[0][[1, 2, 4]]:  # on a scale of its own, a loss that hardly moves would look dramatic
        axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
    axes[1][0].set_ylabel("the paper (read off by eye)")
    axes[0][0].legend(frameon=False, fontsize=8)
    Margins(left=0.65, right=0.15, top=0.55, bottom=0.5, between=(0.45, 0.3)).apply(figure, rows=2, columns=len(TITLES))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _plot(axis: Any, steps: Sequence[int], values: Sequence[float], *, arm: Arm) -> None:
    axis.plot(steps, values, STYLES[arm], color=COLORS[arm], marker=".", label=str(arm))
    axis.grid(alpha=0.3)
