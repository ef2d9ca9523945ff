"""What is said about data sets when a run starts, and recorded of them: licenses, warnings, rows left out."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any


def notices(datasets: Iterable[Any]) -> list[str]:
    """A line of license and warning for each domain or task of rows, and one where rows were left out."""
    lines: list[str] = []
    for dataset in _of_rows(datasets):
        warning = f"; {dataset.warning}" if dataset.warning else ""
        lines.append(f"data {dataset.name}: license: {dataset.license}{warning}")
        lines += [f"data {dataset.name}: {line}" for reading in dataset.readings if (line := reading.line())]
    return lines


def readings(datasets: Iterable[Any]) -> dict[str, list[dict[str, Any]]]:
    """What became of the rows of each source, by the names of the data sets, for the manifest."""
    found: dict[str, list[dict[str, Any]]] = {}
    for dataset in _of_rows(datasets):
        found.setdefault(dataset.name, []).extend(asdict(reading) for reading in dataset.readings)
    return found


def _of_rows(datasets: Iterable[Any]) -> list[Any]:
    """Each once; a task may have the name of a domain, and both are said."""
    return list(dict.fromkeys(dataset for dataset in datasets if hasattr(dataset, "readings")))
