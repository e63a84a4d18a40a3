"""A figure that a notebook shows, whether or not pyplot was ever imported in it. It needs matplotlib."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

__all__ = ["NotebookFigure"]


class NotebookFigure(Figure):
    """A matplotlib figure that belongs to no window. matplotlib's own shows itself only after pyplot's import."""

    def save(self, path: str | Path) -> None:
        """Writes the figure in the format of the name's ending."""
        self.savefig(path)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
