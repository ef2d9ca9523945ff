"""What a study has not got: cells without a run, runs without records, questions without an answer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from immunize.study import ATTACKER, Study, differences

LONGEST = 300  # of a reason: an error's message may hold anything


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A run that failed, was interrupted or is damaged, or cells that no run was made for."""

    status: str
    defense: str
    cell: str
    seeds: Sequence[int]
    reason: str
    run_id: str | None = None
    has_traceback: bool = False


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a configuration stands in the product of the grid; `defense` and `attacker` are canonical texts."""

    defense: str
    attacker: str
    seed: int


def gaps(study: Study) -> list[Gap]:
    """Unfinished runs, then the cells of the product defense x attack cell x seed that have no run at all."""
    return [*_unfinished(study), *_missing(study)]


def _unfinished(study: Study) -> list[Gap]:
    names = _names(study)
    found = []
    for item in study.unfinished:
        place = _place(item.config)
        found.append(
            Gap(
                status=item.status,
                defense=names.get(place.defense, "?") if place else "?",
                cell=names.get(place.attacker, "?") if place else "?",
                seeds=[place.seed] if place else [],
                reason=item.reason[:LONGEST],
                run_id=item.id,
                has_traceback=item.status == "failed",
            )
        )
    return found


def _missing(study: Study) -> list[Gap]:
    names = _names(study)
    places = [place for config in _configs(study) if (place := _place(config))]
    known = set(places)
    defenses = sorted({place.defense for place in places}, key=lambda text: names[text])
    attackers = dict.fromkeys(place.attacker for place in places)
    seeds = sorted({place.seed for place in places})
    found = []
    for defense in defenses:
        for attacker in attackers:
            lacking = [seed for seed in seeds if _Place(defense=defense, attacker=attacker, seed=seed) not in known]
            if lacking:
                found.append(
                    Gap(
                        status="missing",
                        defense=names[defense],
                        cell=names[attacker],
                        seeds=lacking,
                        reason="no run of this cell is in the study",
                    )
                )
    return found


def _names(study: Study) -> dict[str, str]:
    """What a defense and an attack cell are called: as in the claims, or by what sets them apart."""
    configs = [config for config in _configs(study) if _place(config)]
    chosen = [{key: config[key] for key in ATTACKER} for config in configs]
    names: dict[str, str] = {}
    for config, varied in zip(configs, differences(chosen), strict=True):
        place = _place(config)
        assert place is not None
        label = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in varied.items())
        names[place.attacker] = label or f"learning_rate={config['budget']['learning_rate']:g}"
        names[place.defense] = "+".join(config["defense"]) or "none"
    for claim in study.claims:
        for cell, runs in claim.cells.items():
            place = _place(runs[0].manifest["config"])
            assert place is not None
            names[place.attacker] = cell
            names[place.defense] = claim.name
    return names


def _configs(study: Study) -> list[Mapping[str, Any]]:
    return [run.manifest["config"] for run in study.runs] + [item.config for item in study.unfinished]


def _place(config: Mapping[str, Any]) -> _Place | None:
    """None for a manifest that holds no whole configuration."""
    if not all(key in config for key in (*ATTACKER, "defense", "seed", "control", "model")):
        return None
    kept = {
        key: value
        for key, value in config.items()
        if key not in (*ATTACKER, "seed", "study", "figure", "runtime", "tracking")
    }
    return _Place(
        defense=_text(kept),
        attacker=_text({key: config[key] for key in ATTACKER}),
        seed=config["seed"],
    )


def _text(value: Mapping[str, Any]) -> str:
    """One text for one value; a manifest is plain already."""
    return json.dumps(value, sort_keys=True)
