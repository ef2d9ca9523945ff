"""generalization/*: within_budget under attack data, and measured on prompts, that the defense never saw.

Rosati et al. 2024, Section 3: in-domain is other categories of the same domain, cross-domain another domain.
"""

from immunize.conditions.exposure import Exposure
from immunize.conditions.resistance import within_budget
from immunize.types import Check


def generalization(exposure: Exposure) -> Check:
    """The question of `within_budget`, asked of the exposure `in_domain` or `cross_domain`."""
    return within_budget(exposure, name=f"generalization/{exposure.evaluation_set.name}")
