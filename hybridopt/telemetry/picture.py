"""Pictures as inline SVG, readable on light and on dark backgrounds.

Text and axes are drawn in the reader's text color (``currentColor``); data should use
mid tones that stand out on both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

from hybridopt.telemetry.extras import require

__all__ = ["INK", "draw"]

INK = "#010203"
"""Becomes the reader's text color; no data color is this."""


def draw(
    fill: Callable[[Any], None], *, label: str, size: tuple[float, float] = (9, 4)
) -> str:
    """One picture as an ``<svg>`` element for an HTML page.

    Args:
        fill: Draws into the axes.
        label: What the picture shows, for those who cannot see it.
        size: Width and height in inches.

    Raises:
        HybridError: matplotlib is not installed.
    """
    figure_module = require("matplotlib.figure", "the report")
    backend = require("matplotlib.backends.backend_svg", "the report")
    rc = require("matplotlib", "the report").rc_context
    settings = {
        "svg.fonttype": "none",
        # Ids of clip paths must not collide between the pictures of one page.
        "svg.hashsalt": label,
        "font.size": 10,
        "font.family": ["sans-serif"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        **{
            key: INK
            for key in (
                "text.color",
                "axes.edgecolor",
                "axes.labelcolor",
                "xtick.color",
                "ytick.color",
            )
        },
    }
    with rc(settings):
        figure = figure_module.Figure(figsize=size, layout="constrained")
        backend.FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        fill(axes)
        legend = axes.get_legend()
        if legend is not None:
            legend.get_frame().set_alpha(0.0)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """Strip what only a file of its own needs, so that the page refers to nothing."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href").replace(INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
