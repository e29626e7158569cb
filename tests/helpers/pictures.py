"""One picture per figure and numbers: matplotlib takes a second for those of a report."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

Picture = Callable[..., str]
_drawn: dict[Any, str] = {}


def once(picture: Picture) -> Picture:
    """`picture(paint, ...)`, anew only for a paint and values in it that were not seen yet."""

    def drawn(paint: FunctionType, **options: Any) -> str:
        values = [repr(cell.cell_contents) for cell in paint.__closure__ or ()]
        if any(" at 0x" in value for value in values):  # an address: nothing to know it by
            return picture(paint, **options)
        key = (paint.__code__, *values, *sorted(options.items()))
        if key not in _drawn:
            _drawn[key] = picture(paint, **options)
        return _drawn[key]

    return drawn
