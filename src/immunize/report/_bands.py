from dataclasses import dataclass
from typing import Any

import numpy as np

from immunize.types import Arm


@dataclass
class Band:
    steps: Any
    mean: Any
    low: Any
    high: Any


def harm_band(replicates: Any, *, exposure: str, judge: str, settings: Any) -> dict[Arm, Band]:
    out: dict[Arm, Band] = {}
    for arm in Arm:
        cur = []
        for r in replicates:
            m = {
                s.step: np.mean(s.scores)
                for s in r.scores
                if s.arm is arm
                and s.tuned_on == exposure == s.measured_on
                and s.judge == judge
                and s.metric == "harmfulness"
            }
            if m:
                cur.append(m)
        if cur:
            steps = sorted(cur[0])
            a = np.array([[c[s] for s in steps] for c in cur])
            out[arm] = Band(np.array(steps), a.mean(0), np.clip(a.min(0) - 0.05, 0, 1), np.clip(a.max(0) + 0.05, 0, 1))
    return out
