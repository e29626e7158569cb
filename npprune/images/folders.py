"""Image files below a folder, each found once.

Hidden files and folders and those that systems make for themselves are left out at every level.
Folders behind links are read, but no folder twice. What is left out for its ending is known.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from npprune.errors import DataError
from npprune.images.decoding import ENDINGS

SYSTEM_FOLDERS = frozenset(
    (
        "__macosx", "network trash folder", "temporary items",  # macOS and its network shares
        "$recycle.bin", "system volume information", "lost+found",  # Windows, Linux
        "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot",
        "__pycache__",
    )
)  # fmt: skip
"""Folders, in lower case, that hold nobody's images: rubbish, thumbnails, snapshots, caches."""

COMPANIONS = frozenset(
    (
        "thumbs.db", "ehthumbs.db", "desktop.ini", "readme", "license", "licence", "copying",
        "notice", "authors", "changelog", "makefile", "checksums", "md5sums", "sha256sums",
        ".txt", ".md", ".rst", ".pdf", ".html", ".htm", ".url", ".json", ".jsonl", ".csv", ".tsv",
        ".xml", ".yaml", ".yml", ".toml", ".ini", ".db", ".log", ".py", ".pyc", ".ipynb", ".sh",
        ".md5", ".sha256", ".cls", ".identifier", ".xmp", ".aae",
    )
)  # fmt: skip
"""Names and endings, in lower case, of files that lie beside images and need no mention."""

SHOWN = 5  # endings named in one message
_ENDINGS = frozenset(ENDINGS)


@dataclass
class Tree:
    """What lies below `root`. All paths are relative to it, with `/`, in the order of names.

    folders: those directly below. images: the files to read. others: files without an ending of
    an image, and special files. again: links to what is read under another name, or back to a
    folder around them. lost: links that lead nowhere.
    """

    root: Path
    folders: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    special: set[str] = field(default_factory=set)  # of `others`

    def notes(self, folders: Container[str] | None = None) -> list[str]:
        """Warnings about what was left out: in all, or in some of the folders directly below."""

        def inside(paths: list[str]) -> list[str]:
            return [p for p in paths if folders is None or p.partition("/")[0] in folders]

        notes = []
        counted = self._endings(inside(self.others))
        if n := counted.total():
            what = "files that are no images" if n > 1 else "file that is no image"
            notes.append(f"`{self.root}`: left out {n} {what} npprune reads: {_listed(counted)}")
        if again := inside(self.again):
            notes.append(
                f"`{self.root}`: {_links(again)} to what is read under another name; each file "
                "counts once"
            )
        if lost := self.lost:  # a class may be behind it, so whatever the folder
            notes.append(f"`{self.root}`: {_links(lost)} nowhere")
        return notes

    def without_images(self) -> DataError:
        """The error for a tree in which nothing counts as an image."""
        empty = not (self.folders or self.others or self.lost)
        why = ": the folder is empty" if empty else self.instead("")
        hint = f"image files end in {', '.join(ENDINGS)}"
        return DataError(f"no images below `{self.root}`{why}", hint=hint)

    def instead(self, folder: str) -> str:
        """What is below a folder without images, to say behind that; "" for nothing."""
        if folder in self.again:
            return ": it is a link to what is read under another name"
        inside = [p for p in self.others if not folder or p.startswith(f"{folder}/")]
        found = self._endings(inside, companions=True)
        return f", only {_listed(found)}" if found else ""

    def _endings(self, paths: list[str], companions: bool = False) -> Counter[str]:
        counted: Counter[str] = Counter()
        for path in paths:
            name = path.rpartition("/")[2].lower()
            ending = os.path.splitext(name)[1]
            if companions or not {name, ending} & COMPANIONS:
                known = 1 < len(ending) < 12 and " " not in ending
                kind = ending if known else "without ending"
                counted["pipe, socket or device" if path in self.special else kind] += 1
        return counted


def walk(root: Path) -> Tree:
    """Everything below `root`.

    A folder that is reached twice, by links, is read where it really is, or else by the link
    nearest to `root`. The same holds for a link to a file inside; files elsewhere count under
    each name that leads to them.

    Raises:
        DataError: `root` is missing or no folder, or a folder in it cannot be listed.
    """
    if not root.is_dir():
        what = "is a file, not an image folder" if root.exists() else "does not exist"
        raise DataError(f"image folder `{root}` {what}", hint="check the path")
    walker = _Walker(root)
    try:
        folders = [_Folder("", os.path.realpath(root))]
        while folders:  # all real folders before the links found in them
            links = walker.read(folders)
            folders = [
                link
                for link in sorted(links, key=lambda link: (link.path.count("/"), link.path))
                if not walker.leads_back(link)
            ]
    except OSError as err:
        raise DataError(f"cannot list `{err.filename or root}`: {err.strerror}") from err
    walker.count_file_links()
    tree = walker.tree
    for paths in (tree.folders, tree.images, tree.others, tree.again, tree.lost):
        paths.sort(key=lambda path: path.split("/"))
    return tree


@dataclass(frozen=True)
class _Folder:
    path: str  # relative to the root, through links
    real: str  # where it is
    holder: str = ""  # where the folder is that it was found in; "" for a real folder


class _Walker:
    def __init__(self, root: Path) -> None:
        self.tree = Tree(root)
        self.root = os.path.realpath(root)
        self.seen: set[str] = set()  # real paths of the folders read
        self.file_links: list[str] = []

    def read(self, folders: list[_Folder]) -> list[_Folder]:
        """Read these folders and the real ones in them; returns the links to others."""
        links: list[_Folder] = []
        for start in folders:
            stack = [start]
            while stack:
                folder = stack.pop()
                if folder.real in self.seen:
                    self.tree.again.append(folder.path)
                    continue
                self.seen.add(folder.real)
                for found in self._list(folder):
                    (links if found.holder else stack).append(found)
        return links

    def leads_back(self, link: _Folder) -> bool:
        """Whether a folder around the link, or around all of this, is behind it; then noted."""
        around = link.real.rstrip(os.sep) + os.sep
        back = any((place + os.sep).startswith(around) for place in (link.holder, self.root))
        if back:
            self.tree.again.append(link.path)
        return back

    def count_file_links(self) -> None:
        """Links to files: those into a folder that was read are counted there already."""
        real = lru_cache(maxsize=1024)(os.path.realpath)  # links to files come in thousands
        for path in self.file_links:
            link = os.path.join(self.tree.root, path)
            target = os.path.join(os.path.dirname(link), os.readlink(link))
            folder, name = real(os.path.dirname(target)), os.path.basename(target)
            counted = folder in self.seen and not _left_alone(name) and _is_image(name)
            (self.tree.again if counted else self.tree.images).append(path)

    def _list(self, folder: _Folder) -> list[_Folder]:
        found = []
        with os.scandir(self.tree.root / folder.path) as entries:
            for entry in entries:
                if _left_alone(entry.name):
                    continue
                path = f"{folder.path}/{entry.name}" if folder.path else entry.name
                kind = _kind(entry)
                if kind == "folder":
                    real = os.path.realpath(entry.path)
                    link = real != os.path.join(folder.real, entry.name)
                    found.append(_Folder(path, real, folder.real if link else ""))
                    if not folder.path:
                        self.tree.folders.append(path)
                else:
                    self._take(path, kind, entry)
        return found

    def _take(self, path: str, kind: str, entry: os.DirEntry[str]) -> None:
        if kind == "special":
            self.tree.others.append(path)
            self.tree.special.add(path)
        elif _is_image(entry.name):  # reading it will tell, where its link leads nowhere
            link = kind == "file" and entry.is_symlink()
            (self.file_links if link else self.tree.images).append(path)
        else:
            (self.tree.lost if kind == "lost" else self.tree.others).append(path)


def _kind(entry: os.DirEntry[str]) -> str:
    """folder, file, special, or lost: a link that leads nowhere."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "special" if os.path.exists(entry.path) else "lost"
    except OSError:  # a link in a circle, or to where one may not look
        return "lost"


def _left_alone(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _ENDINGS


def _listed(counted: Counter[str]) -> str:
    ordered = sorted(counted.items(), key=lambda entry: (-entry[1], entry[0]))
    parts = [f"{n} {ending}" for ending, n in ordered[:SHOWN]]
    if rest := sum(n for _, n in ordered[SHOWN:]):
        parts.append(f"{rest} more")
    return ", ".join(parts)


def _links(paths: list[str]) -> str:
    if len(paths) == 1:
        return f"link `{paths[0]}` leads"
    return f"{len(paths)} links, e.g. `{paths[0]}`, lead"
