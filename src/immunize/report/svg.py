"""Panels as SVG: inline in the page, whose style sheet has the inks, or as files with inks of their own."""

from html import escape

from immunize.report.drawing import Area, Line, Mark, Panel, Points, Words
from immunize.report.inks import INKS

RULES = (
    "svg.panel text{font-family:system-ui,-apple-system,'Segoe UI','Helvetica Neue',sans-serif;fill:currentColor}"
    "svg.panel .l{fill:none;stroke:currentColor;stroke-linejoin:round}"
    "svg.panel .a{fill:currentColor;stroke:none}"
)


def inline(panel: Panel) -> str:
    """An element for the page; its inks are classes."""
    return f"<svg {_head(panel)}>{_body(panel)}</svg>"


def file(panel: Panel) -> str:
    """A picture that stands alone, on white."""
    inks = "".join(f".{name}{{color:{color}}}" for name, color in INKS.items())
    ground = f'<rect width="{panel.width:g}" height="{panel.height:g}" fill="{INKS["paper"]}"/>'
    namespace = 'xmlns="http://www.w3.org/2000/svg"'
    return f"<svg {namespace} {_head(panel)}><style>{RULES}{inks}</style>{ground}{_body(panel)}</svg>\n"


def _head(panel: Panel) -> str:
    width, height = f"{panel.width:g}", f"{panel.height:g}"
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'class="panel" {size} role="img" aria-label="{escape(panel.title)}"'


def _body(panel: Panel) -> str:
    return "".join(map(_element, panel.marks))


def _element(mark: Mark) -> str:
    match mark:
        case Line():
            width = "" if mark.width == 1 else f' stroke-width="{mark.width:g}"'
            dashes = f' stroke-dasharray="{mark.dashes[0]:g} {mark.dashes[1]:g}"' if mark.dashes else ""
            return f'<path class="l {mark.ink}" d="M{_path(mark.points)}"{width}{dashes}/>'
        case Area():
            opacity = "" if mark.opacity == 1 else f' opacity="{mark.opacity:g}"'
            filled = f'<path class="a {mark.ink}" d="M{_path(mark.points)}Z"{opacity}/>'
            if mark.outline:
                filled += f'<path class="l {mark.outline}" d="M{_path(mark.points)}Z" stroke-dasharray="3 2"/>'
            return filled
        case Words():
            anchor = "" if mark.anchor == "start" else f' text-anchor="{mark.anchor}"'
            weight = ' font-weight="600"' if mark.bold else ""
            place = f'x="{mark.x:.1f}" y="{mark.y:.1f}" font-size="{mark.size:g}"'
            return f'<text class="{mark.ink}" {place}{anchor}{weight}>{escape(mark.text)}</text>'


def _path(points: Points) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
