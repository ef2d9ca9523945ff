"""The verdicts as CSV for a program and as Markdown for a text."""

import csv
import io
from collections.abc import Sequence

from immunize.report.conclusions import speaking
from immunize.report.costs import Cost
from immunize.report.numbers import both_steps, interval, limit, number, with_interval
from immunize.report.order_in_words import REVERSED, agreement_in_words, count_in_words, remarks, reversals
from immunize.report.study import CheckRow, ClaimView, StudyView

COLUMNS = (
    "defense",
    "control",
    "check",
    "judge",
    "verdict",
    "estimate",
    "low",
    "high",
    "threshold",
    "degree",
    "steps_control",
    "steps_defended",
    "censored",
    "worst_cell",
    "cells",
    "seeds",
    "per_seed",
    "flags",
    "reason",
    "runs",
)
FORMULA = ("=", "+", "-", "@", "\t")


def verdicts_csv(view: StudyView) -> str:
    """One line a check and judge; lists are separated by semicolons, what is not there is empty."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(COLUMNS)
    for claim in view.claims:
        writer.writerows(_line(claim, row) for row in claim.rows)
    return target.getvalue()


def table_md(view: StudyView) -> str:
    """Every defense against every check, then each claim with its grid."""
    lines = [f"# Study {_cell(view.study.name)}", ""]
    defended = [claim for claim in view.claims if not claim.claim.is_control]
    if not defended:
        return "\n".join([*lines, "No defense was under test: nothing to check.", *_beside(view), ""])
    lines += _table(
        ["defense", *view.check_names],
        [[claim.name, *(_verdict(claim, name) for name in view.check_names)] for claim in defended],
    )
    lines += _beside(view)
    for judge in view.later_judges:
        lines += ["", f"## As {_cell(judge.name)} judges", "", *(f"- {_cell(line)}" for line in judge.agreements), ""]
        pairs = [(item.defense, item.earlier.check, item.later.check) for item in judge.opinions]
        lines += _table(
            ["defense", "check", "verdict", "estimate [interval]", f"under {judge.name}", "estimate [interval]"],
            [
                [defense, one.name, one.verdict, interval(one), other.verdict, interval(other)]
                for defense, one, other in pairs
            ],
        )
    for claim in defended:
        lines += ["", f"## {_cell(claim.name)}", "", _cell(claim.conclusion), ""]
        lines += [f"- {_cell(fact.term)}: {'; '.join(map(_cell, fact.values))}" for fact in claim.facts]
        lines.append("")
        lines += _table(
            ["check", "verdict", "estimate [interval]", "limit", "degree", "worst case", "steps C/D", "reason"],
            [
                [
                    row.item.check.name,
                    row.item.check.verdict + "*" * bool(row.item.check.flags),
                    interval(row.item.check),
                    limit(row.item.check),
                    number(row.item.check.degree),
                    row.item.worst_cell or "-",
                    both_steps(row.item.check),
                    "; ".join([row.item.check.reason, *row.item.check.flags]),
                ]
                for row in claim.rows
            ],
        )
    return "\n".join([*lines, ""])


def _beside(view: StudyView) -> list[str]:
    """Each table of a paper with ours: the paper's number behind ours, in brackets."""
    lines: list[str] = []
    for item in view.comparisons:
        setting = f" ({item.setting})" if item.setting else ""
        lines += [
            "",
            f"## {_cell(item.table.title + setting)}",
            "",
            _cell(f"{count_in_words(item)} {agreement_in_words(item)}"),
            "",
        ]
        if turned := reversals(item):
            lines += [REVERSED, "", *(f"- {_cell(line)}" for line in turned), ""]
        if item.places:
            lines += [
                f"Each cell: here, with its {item.confidence:.0%} interval over seeds and objects (the paper).",
                "",
            ]
        rows = [
            [
                row.method or "-",
                row.defense or "-",
                *(
                    f"{with_interval(cell.ours, decimals=item.table.decimals)} ({number(cell.paper)})"
                    for cell in row.cells
                ),
            ]
            for row in item.rows
        ]
        heads = [f"{place.column.label} ({place.ours})" for place in item.places]
        lines += _table(["paper", "here", *heads], rows) if item.places else []
        lines += ["", _cell(" ".join([item.table.source, item.table.note, *remarks(item)]))]
    for cost in view.costs:
        lines += ["", f"## {_cell(cost.table.title)}", ""]
        lines += ["Each cell: here, with its multiple of the undefended model's tuning (the paper, with its own).", ""]
        rows = [[row.method or "-", row.defense or "-", *map(_cost, row.cells)] for row in cost.rows]
        lines += _table(["paper", "here", *(column.label for column in cost.table.columns)], rows)
        lines += ["", _cell(f"{cost.table.source} {cost.table.note}")]
    return lines


def _cost(cell: Cost) -> str:
    """Seconds here with their multiple of the undefended model's tuning, and the paper's number with its own."""
    ours = "-" if cell.seconds is None else f"{cell.seconds:.1f} s" + _times(cell.multiple)
    return f"{ours} ({number(cell.paper)}{_times(cell.paper_multiple)})"


def _times(multiple: float | None) -> str:
    return "" if multiple is None else f", {multiple:.2f}x"


def _line(claim: ClaimView, row: CheckRow) -> list[str]:
    check = row.item.check
    numbers = (check.estimate, check.low, check.high, check.threshold, check.degree)
    return [
        _text(claim.name),
        _text(str(claim.claim.runs[0].manifest["config"]["control"])),
        _text(check.name),
        _text(check.judge),
        str(check.verdict),
        *("" if value is None else repr(value) for value in numbers),
        *("" if value is None else str(value) for value in (check.steps_control, check.steps_defended)),
        ";".join(check.censored),
        _text(row.item.worst_cell or ""),
        _text(";".join(row.item.cells)),
        ";".join(map(str, row.item.seeds)),
        ";".join(map(repr, row.item.per_seed)),
        _text(";".join(check.flags)),
        _text(check.reason),
        _text(";".join(run.id for run in row.runs)),
    ]


def _text(value: str) -> str:
    """No spreadsheet may take a record's text for a formula."""
    return f"'{value}" if value.startswith(FORMULA) else value


def _verdict(claim: ClaimView, name: str) -> str:
    found = [item.check for item in speaking(claim.checks) if item.check.name == name]
    return found[0].verdict + "*" * bool(found[0].flags) if found else "-"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(head), "|" + "---|" * len(head), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """On one line, and neither a column's end nor a tag nor a link."""
    for sign in "\\`*_|[]<>":
        text = text.replace(sign, f"&#{ord(sign)};") if sign in "<>|" else text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
