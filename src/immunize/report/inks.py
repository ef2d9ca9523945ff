"""The colors of a study's pictures, by what they mean. On paper; the page's style sheet has its own for the dark.

Verdicts differ in lightness as much as in hue, so that they can be told apart in grey and by the color-blind.
"""

INKS = {
    "ink": "#1d1f21",
    "muted": "#666b70",
    "rule": "#e3e3df",
    "paper": "#ffffff",
    "control": "#b2182b",
    "defended": "#2166ac",
    "limit": "#1d1f21",
    "harmful": "#6d3a1c",
    "broken": "#a3a3a3",
    "refused": "#dbe7ee",
    "holds": "#cfe3f1",
    "fails": "#a8380b",
    "undetermined": "#f7f7f4",
    "on-holds": "#123a57",
    "on-fails": "#ffffff",
    "on-undetermined": "#4b4f54",
    "degree-0": "#ffffff",
    "degree-1": "#f3f6f4",
    "degree-2": "#d5e5dd",
    "degree-3": "#a9cfc0",
    "degree-4": "#5f9f8c",
    "degree-5": "#1f6a5a",
    "on-degree-0": "#666b70",
    "on-degree-1": "#1d1f21",
    "on-degree-2": "#1d1f21",
    "on-degree-3": "#1d1f21",
    "on-degree-4": "#0b1f1a",
    "on-degree-5": "#ffffff",
    "on-paper": "#666b70",
}
