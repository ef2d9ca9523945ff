"""Panels as PNG, by matplotlib's rasterizer alone: without its figures and axes it is twenty times as fast."""

import io
from typing import Any

from immunize.report.drawing import Area, Line, Panel, Points, Words
from immunize.report.inks import INKS

SCALE = 2.0  # pixels of the picture for one of the page
POINTS_PER_PIXEL = 0.72


def png(panel: Panel) -> bytes:
    """The picture's file; equal panels give equal bytes."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.image import imsave

    height = round(panel.height * SCALE)
    renderer = RendererAgg(round(panel.width * SCALE), height, 100)
    brush = _Brush(renderer, height)
    brush.area(((0, 0), (panel.width, 0), (panel.width, panel.height), (0, panel.height)), "paper", 1.0)
    for mark in panel.marks:
        match mark:
            case Line():
                brush.line(mark.points, mark.ink, mark.width, mark.dashes)
            case Area():
                brush.area(mark.points, mark.ink, mark.opacity)
                if mark.outline:
                    brush.line([*mark.points, mark.points[0]], mark.outline, 1.0, (3.0, 2.0))
            case Words():
                brush.words(mark)
    target = io.BytesIO()
    unsigned: Any = {"Software": None}  # no version of matplotlib in the file
    imsave(target, renderer.buffer_rgba(), format="png", metadata=unsigned, pil_kwargs={"compress_level": 3})
    return target.getvalue()


class _Brush:
    """Draws in the page's pixels, y downward."""

    def __init__(self, renderer: Any, height: int) -> None:
        from matplotlib.transforms import Affine2D

        self.renderer, self.height = renderer, height
        self.transform = Affine2D().scale(SCALE, -SCALE).translate(0, height)

    def line(self, points: Points, ink: str, width: float, dashes: tuple[float, float] | None) -> None:
        context = self._context(ink)
        context.set_linewidth(width * SCALE * POINTS_PER_PIXEL)
        context.set_joinstyle("round")
        context.set_capstyle("butt")
        if dashes:
            context.set_dashes(0, [length * SCALE * POINTS_PER_PIXEL for length in dashes])
        self.renderer.draw_path(context, self._path(points), self.transform, None)

    def area(self, points: Points, ink: str, opacity: float) -> None:
        from matplotlib.colors import to_rgb

        context = self._context(ink)
        context.set_linewidth(0)
        context.set_alpha(opacity)
        closed = self._path([*points, points[0]])
        self.renderer.draw_path(context, closed, self.transform, (*to_rgb(INKS[ink]), opacity))

    def words(self, mark: Words) -> None:
        from matplotlib.font_manager import FontProperties

        size = mark.size * SCALE * POINTS_PER_PIXEL * 0.92  # its sans is wider than those of browsers
        font = FontProperties(family="DejaVu Sans", size=size, weight="bold" if mark.bold else "normal")
        x, y = mark.x * SCALE, mark.y * SCALE
        if mark.anchor != "start":
            width = self.renderer.get_text_width_height_descent(mark.text, font, False)[0]
            x -= width if mark.anchor == "end" else width / 2
        self.renderer.draw_text(self._context(mark.ink), x, y, mark.text, font, 0)

    def _context(self, ink: str) -> Any:
        context = self.renderer.new_gc()
        context.set_foreground(INKS[ink])
        context.set_antialiased(True)
        return context

    @staticmethod
    def _path(points: Points) -> Any:
        from matplotlib.path import Path

        return Path([tuple(point) for point in points])
