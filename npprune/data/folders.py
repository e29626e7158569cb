"""Folders of classes: which folder is a class, and whether one was meant that lies deeper."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from npprune.errors import DataError
from npprune.images.folders import Tree, walk

SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))


def read_classes(
    root: Path, *, named: bool = False
) -> tuple[Tree, dict[str, list[str]], list[str]]:
    """All that lies below `root`; class folder -> its images, in natural order; warnings.

    named: the folders of `root` are known to be the classes, however deep their images lie.

    Raises:
        DataError: no images, none in folders, or splits or data sets in place of classes.
    """
    from timm.utils.misc import natural_key

    tree = walk(root)
    names = sorted(tree.folders, key=lambda name: (natural_key(name), name))
    files: dict[str, list[str]] = {name: [] for name in names}
    loose: list[str] = []
    for path in tree.images:
        name, slash, _ = path.partition("/")
        (files[name] if slash else loose).append(path)
    if not any(files.values()):
        raise _without_labels(root) if loose else tree.without_images()
    notes = _require_classes(tree, [name for name, paths in files.items() if paths], named)
    if loose:
        what = "1 image lies" if len(loose) == 1 else f"{len(loose)} images lie"
        notes.append(f"`{root}`: {what} in no class folder and left out, e.g. `{loose[0]}`")
    return tree, files, notes


def without_images(tree: Tree, name: str) -> DataError:
    """The error for a class folder in which nothing counts as an image."""
    return DataError(
        f"class folder `{tree.root / name}` has no images{tree.instead(name)}",
        hint="remove the folder, or choose other classes with --classes",
    )


def _without_labels(root: Path) -> DataError:
    return DataError(
        f"`{root}` holds images without class folders, so without labels",
        hint="put the images of each class into a folder of its own",
    )


def _require_classes(tree: Tree, names: list[str], named: bool) -> list[str]:
    """Refuse, or warn of, a `root` whose class folders lie deeper. names: those with images."""
    root, levels = tree.root, _class_levels(tree)
    splits = [name for name in names if name.lower() in SPLIT_NAMES]
    inside = [name for name in splits if name in levels]
    if len(splits) == len(names) or len(inside) > 1:
        raise DataError(
            f"`{root}` holds splits ({', '.join(splits)}), not class folders",
            hint=_did_you_mean(root, inside or splits),
        )
    if named or not levels or levels[0] == "":
        return []
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    hint = _did_you_mean(root, levels)
    if len(names) == 1:
        raise DataError(
            f"`{root}` holds one folder ({listed}), and the class folders seem to lie deeper",
            hint=f"{hint} If `{listed}` is a class, name it in a class map",
        )
    if all(place.rpartition("/")[2].lower() in SPLIT_NAMES for place in levels):
        raise DataError(f"`{root}` holds data sets ({listed}), not class folders", hint=hint)
    return [
        f"`{root}`: each folder ({listed}) counts as one class, and all hold folders of images; "
        f"if those are the classes, {hint}"
    ]


def _did_you_mean(root: Path, places: list[str]) -> str:
    return f"did you mean {' or '.join(f'`folder:{root / place}`' for place in places[:3])}?"


def _class_levels(tree: Tree) -> list[str]:
    """Folders that look like folders of classes, the nearest first; "" is `root` itself.

    They hold two class folders or more, `root` one or more. A class folder holds images, or one
    folder that does (`class/images/0.jpg`), and so on.
    """
    direct = {path.rpartition("/")[0] for path in tree.images}
    inside: dict[str, set[str]] = defaultdict(set)
    for folder in direct:
        while folder:
            parent = folder.rpartition("/")[0]
            inside[parent].add(folder)
            folder = parent

    def is_class(folder: str) -> bool:
        while folder not in direct and len(inside[folder]) == 1:
            (folder,) = inside[folder]
        return folder in direct

    levels = [f for f in inside if sum(map(is_class, inside[f])) > (1 if f else 0)]
    return sorted(levels, key=lambda folder: (folder.count("/"), bool(folder), folder))
