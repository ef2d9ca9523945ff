"""Panels as PNG, in the fewest steps: matplotlib's rasterizer for the lines, Pillow for the words and the file.

Through matplotlib's own figures and axes the pictures of a large grid would take a minute.
"""

import io
from functools import cache
from typing import Any

from immunize.report.drawing import Area, Line, Mark, Panel, Points, Words, box
from immunize.report.inks import INKS

SCALE = 1.25  # pixels of the picture for one of the page; whoever wants it finer takes the SVG
POINTS_PER_PIXEL = 0.72  # at 100 dots per inch, the rasterizer's unit of width
NARROWER = 0.92  # its letters are wider than those of browsers
ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


def png(panel: Panel) -> bytes:
    """The picture's file; equal panels give equal bytes."""
    from matplotlib.backends.backend_agg import RendererAgg
    from PIL import Image, ImageDraw

    width, height = round(panel.width * SCALE), round(panel.height * SCALE)
    brush = _Brush(RendererAgg(width, height, 100), height)
    brush.draw(Area(points=box(0, 0, panel.width, panel.height), ink="paper"))
    for mark in panel.marks:
        brush.draw(mark)
    picture = Image.frombuffer("RGBA", (width, height), brush.renderer.buffer_rgba()).convert("RGB")
    pen = ImageDraw.Draw(picture)
    for mark in panel.marks:
        if isinstance(mark, Words):
            place = (mark.x * SCALE, mark.y * SCALE)
            font = _font(mark.size * SCALE * NARROWER, mark.bold)
            pen.text(place, mark.text, font=font, fill=INKS[mark.ink], anchor=ANCHORS[mark.anchor])
    target = io.BytesIO()
    picture.save(target, "PNG", compress_level=3)
    return target.getvalue()


@cache
def _font(size: float, bold: bool) -> Any:
    """The font that comes with matplotlib, so that pictures are alike on every machine."""
    import matplotlib
    from PIL import ImageFont

    name = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans{'-Bold' * bold}.ttf"
    return ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC)


class _Brush:
    """Draws in the page's pixels, y downward."""

    def __init__(self, renderer: Any, height: int) -> None:
        from matplotlib.transforms import Affine2D

        self.renderer = renderer
        self.transform = Affine2D().scale(SCALE, -SCALE).translate(0, height)

    def draw(self, mark: Mark) -> None:
        """A line or an area; words are left to Pillow."""
        match mark:
            case Line():
                self._line(mark.points, mark.ink, mark.width, mark.dashes)
            case Area():
                self._area(mark)
                if mark.outline:
                    self._line([*mark.points, mark.points[0]], mark.outline, 1.0, (3.0, 2.0))

    def _line(self, points: Points, ink: str, width: float, dashes: tuple[float, float] | None) -> None:
        context = self._context(ink, width=width)
        if dashes:
            context.set_dashes(0, [length * SCALE * POINTS_PER_PIXEL for length in dashes])
        self.renderer.draw_path(context, self._path(points), self.transform, None)

    def _area(self, mark: Area) -> None:
        from matplotlib.colors import to_rgb

        context = self._context(mark.ink, width=0)
        context.set_alpha(mark.opacity)
        closed = self._path([*mark.points, mark.points[0]])
        self.renderer.draw_path(context, closed, self.transform, (*to_rgb(INKS[mark.ink]), mark.opacity))

    def _context(self, ink: str, *, width: float) -> Any:
        context = self.renderer.new_gc()
        context.set_foreground(INKS[ink])
        context.set_linewidth(width * SCALE * POINTS_PER_PIXEL)
        context.set_joinstyle("round")
        context.set_capstyle("butt")
        return context

    @staticmethod
    def _path(points: Points) -> Any:
        from matplotlib.path import Path

        return Path([tuple(point) for point in points])
