"""The data roles that an alignment-stage defense may need."""

ROLES = ("harmful", "refusals", "paired", "retain")
