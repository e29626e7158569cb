"""The explorer's files: pages that ship with npprune, and a run's data as scripts beside them.

A browser loads scripts and images from disk, but fetches nothing: so each piece of data is a
script that hands it over. As one file, pieces are JSON texts in the page and pictures data URIs.
Equal data gives equal bytes.
"""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from npprune.images import thumbnails

SCRIPTS = ("base.js", "pictures.js", "graph.js", "pages.js", "compare.js", "app.js")
STYLE, PAGE = "explorer.css", "index.html"
DATA, THUMBS = "data", "thumbs"
LARGEST = 224  # pixels of a picture's longer side
POLICY = (
    "default-src 'none'; script-src 'self' file:{inline}; style-src 'self' file:{inline}; "
    "img-src 'self' file: data:; base-uri 'none'; form-action 'none'"
)


class Site:
    """Takes data and pictures; writes them into a folder, or keeps them for one file."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._data: list[tuple[str, str]] = []
        self._pictures: dict[int, str] = {}
        self.ending = thumbnails.ending()

    def picture(self, row: int, pixels: np.ndarray) -> None:
        """The picture of an image: [h, w, 3] or [h, w] in 0 to 255."""
        file = thumbnails.encoded(pixels, LARGEST)
        if self.folder is None:
            text = base64.b64encode(file).decode()
            kind = "webp" if self.ending == "webp" else "jpeg"
            self._pictures[row] = f"data:image/{kind};base64,{text}"
            return
        place = self.folder / THUMBS
        place.mkdir(exist_ok=True)
        (place / f"{row:06d}.{self.ending}").write_bytes(file)

    def data(self, name: str, value: Any) -> None:
        """A piece of data, JSON-ready; pages ask for it by its name."""
        text = _json(value)
        if self.folder is None:
            self._data.append((name, text))
            return
        place = self.folder / DATA
        place.mkdir(exist_ok=True)
        (place / f"{name}.js").write_text(f'npprune.take("{name}",{text});\n', "utf-8")

    def finish(self) -> str:
        """The pages themselves, written into the folder; or the one file's text."""
        if self.folder is not None:
            scripts = "".join(f'<script src="{name}" defer></script>\n' for name in SCRIPTS)
            style = f'<link rel="stylesheet" href="{STYLE}">'
            for name in (*SCRIPTS, STYLE):
                (self.folder / name).write_text(_shipped(name), "utf-8")
            page = _page(POLICY.format(inline=""), style, scripts)
            (self.folder / PAGE).write_text(page, "utf-8")
            return page
        self.data("pictures", self._pictures)
        pieces = "".join(
            f'<script type="application/json" data-name="{name}">{text}</script>\n'
            for name, text in self._data
        )
        scripts = "".join(f"<script>\n{_shipped(name)}</script>\n" for name in SCRIPTS)
        style = f"<style>\n{_shipped(STYLE)}</style>"
        return _page(POLICY.format(inline=" 'unsafe-inline'"), style, pieces + scripts)


def objection(folder: Path) -> str | None:
    """Why a folder must not be replaced by an explorer, or None."""
    ours = {*SCRIPTS, STYLE, PAGE, DATA, THUMBS}
    if not (folder / PAGE).is_file() or not (folder / SCRIPTS[0]).is_file():
        return "it is not empty, and not an explorer that npprune wrote"
    other = sorted(p.name for p in folder.iterdir() if p.name not in ours)
    return f"it also holds `{other[0]}`, which npprune did not write" if other else None


def _page(policy: str, head: str, scripts: str) -> str:
    text = _shipped(PAGE)
    for mark, value in (("policy", policy), ("head", head), ("scripts", scripts)):  # data last
        text = text.replace(f"%{mark}%", value)
    return text


def _shipped(name: str) -> str:
    return (files("npprune.report") / "explorer" / name).read_text("utf-8")


def _json(value: Any) -> str:
    """Compact; `<` is written so that no text can end a script."""
    text = json.dumps(_rounded(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _rounded(value: Any) -> Any:
    """Numbers to four digits: more says nothing here, and takes room."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {str(k): _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value
