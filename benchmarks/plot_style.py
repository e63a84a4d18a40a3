"""The colours and markers of every plot, and a plot as PNG."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.figure import Figure

UNIT_COLOUR = "#0072B2"
COLOURS = ["#000000", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C"]
"""Okabe and Ito's, which colour-blind readers tell apart. Markers and dashes tell the lines apart in grey."""
MARKERS = "sD^vP<>Xp*h"


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.size": 10}):
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
