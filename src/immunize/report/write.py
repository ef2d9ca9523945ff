"""Writes the report of a study into its folder. Equal records give equal bytes."""

from pathlib import Path

from immunize.report import svg
from immunize.report.figures import figures
from immunize.report.page import page
from immunize.report.png import png
from immunize.report.study import StudyView
from immunize.report.tables import table_md, verdicts_csv
from immunize.stages import write_durably

FOLDER = "report"
PAGE = "report.html"


def write_report(view: StudyView) -> list[Path]:
    """Page, tables and pictures; each is there as a whole or as it was before, whoever else writes at the time.

    The page comes last: while it is there, so is all that it names.
    """
    folder = view.study.path / FOLDER
    folder.mkdir(exist_ok=True)
    content: dict[str, bytes] = {}
    for name, panel in figures(view).items():
        content[f"{name}.svg"] = svg.file(panel).encode()
        content[f"{name}.png"] = png(panel)
    content["verdicts.csv"] = verdicts_csv(view).encode()
    content["table.md"] = table_md(view).encode()
    content[PAGE] = page(view).encode()
    for name, whole in content.items():
        write_durably(folder / name, whole)
    return [folder / name for name in content]
