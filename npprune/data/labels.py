"""Which class index a folder (or a data set's own class name) means, and how classes are chosen.

Three rules, in this order: an explicit class map; ImageNet synset names; rank in natural order.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npprune.errors import DataError
from npprune.records import ClassInfo

SYNSET = re.compile(r"n\d{8}\Z")


@dataclass
class Labels:
    """A rule applied to the class names of one source."""

    rule: str  # for the reader of a result, e.g. "ImageNet synset folders"
    index: dict[str, int]  # class name in the source -> label
    classes: list[ClassInfo]  # the label space as far as known, by index
    aliases: dict[int, set[str]] = field(default_factory=dict)  # lower case; to choose by
    notes: list[str] = field(default_factory=list)


def find_labels(
    names: Sequence[str],
    *,
    num_classes: int | None = None,
    class_map: str | Path | None = None,
    ranked: str = "folder rank",
    where: str = "",
) -> Labels:
    """The labels of a source whose classes are called `names`, in the source's own order.

    num_classes: outputs of the model; None: unknown, and synsets mean ImageNet-1k.
    ranked: what to call the rule when the label is the position in `names`.

    Raises:
        DataError: bad class map, a name without a label, synsets among other names, a label
            that the model has no output for.
    """
    place = f" in {where}" if where else ""
    if class_map is not None:
        labels = _mapped(names, Path(class_map), place)
    elif any(SYNSET.match(name) for name in names) and (imagenet := _imagenet(num_classes)):
        labels = _synsets(names, imagenet, place)
    else:
        labels = _ranked(names, ranked, num_classes)
    if num_classes is not None:
        for name in names:
            if labels.index[name] >= num_classes:
                raise DataError(
                    f"class `{name}`{place} has label {labels.index[name]} ({labels.rule}), and "
                    f"the model's labels are 0..{num_classes - 1}",
                    hint="use data of the model's classes, or --class-map FILE",
                )
        labels.classes = [c for c in labels.classes if c.index < num_classes]
    for info in labels.classes:
        labels.aliases.setdefault(info.index, set()).add(info.name.lower())
        if info.synset:
            labels.aliases[info.index].add(info.synset)
    return labels


def choose_classes(
    wanted: Sequence[str | int] | str, labels: Labels, *, where: str = ""
) -> list[int]:
    """Labels (ascending) for indices, synsets, class names, or a text file with one a line.

    Names match without regard to case, by the full ImageNet lemma or any of its parts.

    Raises:
        DataError: empty, unknown (with the nearest names) or ambiguous.
    """
    chosen = {_one(token, labels, where) for token in _tokens(wanted, labels)}
    if not chosen:
        raise DataError("`classes` must name at least one class, got none")
    return sorted(chosen)


def read_class_map(path: Path) -> dict[str, tuple[int, str | None]]:
    """Folder name -> (label, display name or None).

    txt: one folder name a line, its line number from 0 is the label. json: a list of folder
    names; {folder: label}; {"label": folder}; or {"label": [folder, display name]}.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(
            f"cannot read class map `{path}`: {getattr(err, 'strerror', None) or err}",
            hint="--class-map takes a .txt or .json file",
        ) from err
    if path.suffix.lower() == ".json":
        return _json_map(text, path)
    if path.suffix.lower() != ".txt":
        raise DataError(
            f"class map must be a .txt or .json file, got `{path}`",
            hint="txt: one folder name a line; json: {folder: label}",
        )
    return _listed([line.strip() for line in text.rstrip().splitlines()], path)


def _json_map(text: str, path: Path) -> dict[str, tuple[int, str | None]]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise DataError(f"class map `{path}` has the key `{key}` twice")
            seen[key] = value
        return seen

    try:
        data = json.loads(text, object_pairs_hook=once)
    except ValueError as err:
        raise DataError(f"class map `{path}` is not valid JSON: {err}") from err
    if isinstance(data, list):
        return _listed(data, path)
    if not isinstance(data, dict) or not data:
        raise DataError(
            f"class map `{path}` must hold an object or a list of names, got {text[:40]!r}",
            hint="write {folder: label}, {label: folder} or [folder, folder, ...]",
        )
    name: str | None
    result: dict[str, tuple[int, str | None]] = {}
    for key, value in data.items():
        if isinstance(value, int) and not isinstance(value, bool):
            folder, label, name = key, value, None
        elif key.isdigit() and isinstance(value, str):
            folder, label, name = value, int(key), None
        elif (
            key.isdigit()
            and isinstance(value, list)
            and len(value) == 2
            and all(isinstance(v, str) for v in value)
        ):
            folder, label, name = value[0], int(key), value[1]
        else:
            raise DataError(
                f"class map `{path}`: cannot read `{key}: {json.dumps(value)}`",
                hint="write {folder: label}, {label: folder} or {label: [folder, name]}",
            )
        if label < 0:
            raise DataError(f"class map `{path}`: a label must be 0 or more, got `{label}`")
        if folder in result:
            raise DataError(f"class map `{path}` names `{folder}` twice")
        result[folder] = (label, name)
    return result


def _listed(names: list[Any], path: Path) -> dict[str, tuple[int, str | None]]:
    result: dict[str, tuple[int, str | None]] = {}
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise DataError(f"class map `{path}`: entry {i + 1} must be a name, got {name!r}")
        if name in result:
            raise DataError(f"class map `{path}` names `{name}` twice")
        result[name] = (i, None)
    if not result:
        raise DataError(f"class map `{path}` is empty")
    return result


def _mapped(names: Sequence[str], path: Path, place: str) -> Labels:
    table = read_class_map(path)
    for name in names:
        if name not in table:
            raise DataError(
                f"class `{name}`{place} is not in the class map `{path}`",
                hint=_nearest(name, table) or "add it to the map, or move its images away",
            )
    lemmas = _lemmas() if any(SYNSET.match(folder) for folder in table) else {}
    classes: dict[int, ClassInfo] = {}
    aliases: dict[int, set[str]] = {}
    for folder, (label, given) in table.items():
        lemma = lemmas.get(folder)
        shown = given or (_short(lemma) if lemma else folder)
        classes.setdefault(label, ClassInfo(label, shown, folder if lemma else None))
        aliases.setdefault(label, set()).update({folder.lower(), shown.lower()})
        aliases[label].update(_parts(lemma or ""))
    return Labels(
        f"class map {path}",
        {name: table[name][0] for name in names},
        [classes[label] for label in sorted(classes)],
        aliases,
    )


def _synsets(names: Sequence[str], imagenet: Any, place: str) -> Labels:
    known = {synset: i for i, synset in enumerate(imagenet.label_names())}
    for name in names:
        if not SYNSET.match(name):
            raise DataError(
                f"class `{name}`{place} is no ImageNet synset, and others there are",
                hint="move it away, or say every label with --class-map FILE",
            )
        if name not in known:
            raise DataError(
                f"class `{name}`{place} is not one of the {len(known)} ImageNet synsets of the "
                "model",
                hint="move it away, or say every label with --class-map FILE",
            )
    lemmas = {synset: imagenet.label_name_to_description(synset) for synset in known}
    return Labels(
        "ImageNet synset folders",
        {name: known[name] for name in names},
        [ClassInfo(i, _short(lemmas[synset]), synset) for synset, i in known.items()],
        {i: _parts(lemmas[synset]) for synset, i in known.items()},
    )


def _ranked(names: Sequence[str], ranked: str, num_classes: int | None) -> Labels:
    notes = []
    if ranked == "folder rank":
        if all(name.isdigit() for name in names) and any(
            int(name) != rank for rank, name in enumerate(names)
        ):
            notes.append(
                "the class folders are numbers, but labels are their ranks: "
                f"`{names[-1]}` has label {len(names) - 1}; --class-map says otherwise"
            )
        elif num_classes is not None and num_classes != len(names):
            notes.append(
                f"labels are folder ranks 0..{len(names) - 1}, and the model has {num_classes} "
                "classes; --class-map says otherwise"
            )
    return Labels(
        ranked,
        {name: rank for rank, name in enumerate(names)},
        [ClassInfo(rank, name) for rank, name in enumerate(names)],
        notes=notes,
    )


def _imagenet(num_classes: int | None) -> Any:
    """timm's ImageNetInfo for a model of so many classes, or None."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes or 1000})
    return ImageNetInfo(subset) if subset else None


def _lemmas() -> dict[str, str]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-21k-goog")
    return {synset: info.label_name_to_description(synset) for synset in info.label_names()}


def _short(lemma: str) -> str:
    return lemma.split(",")[0].strip()


def _parts(lemma: str) -> set[str]:
    """`tabby, tabby cat` can be chosen as that, `tabby` or `tabby cat`."""
    return {
        part for part in (lemma.lower(), *(p.strip().lower() for p in lemma.split(","))) if part
    }


def _tokens(wanted: Sequence[str | int] | str, labels: Labels) -> list[str | int]:
    if not isinstance(wanted, str):
        return list(wanted)
    text = wanted.strip()
    path = Path(text)
    if path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as err:
            raise DataError(f"cannot read the class file `{path}`: {err}") from err
        return [line.strip() for line in lines if line.strip()]
    if path.suffix == ".txt" or "/" in text:
        raise DataError(
            f"class file `{text}` does not exist", hint="one index, synset or name a line"
        )
    if any(text.lower() in names for names in labels.aliases.values()):
        return [text]  # a name may hold commas
    return [part.strip() for part in text.split(",") if part.strip()]


def _one(token: str | int, labels: Labels, where: str) -> int:
    place = f" of {where}" if where else ""
    text = str(token).strip().lower()
    known = {info.index: info for info in labels.classes}
    hits = {label for label, names in labels.aliases.items() if text in names and label in known}
    if re.fullmatch(r"-?\d+", text) and int(text) in known:
        if isinstance(token, int):
            return token
        hits.add(int(text))
    if len(hits) == 1:
        return hits.pop()
    if hits:
        some = ", ".join(_shown(known[label]) for label in sorted(hits)[:5])
        raise DataError(
            f"class `{token}` is ambiguous: {some}", hint="say it by its index or synset"
        )
    if re.fullmatch(r"-?\d+", text):
        low, high = min(known, default=0), max(known, default=0)
        raise DataError(f"class index `{token}` must be one of {low}..{high}{place}")
    names = sorted(set().union(*labels.aliases.values())) if labels.aliases else []
    how = "classes are indices, synsets or names, parted by commas, or a file with one a line"
    raise DataError(f"unknown class `{token}`{place}", hint=_nearest(text, names) or how)


def _shown(info: ClassInfo) -> str:
    return f"{info.index} {info.name}" + (f" ({info.synset})" if info.synset else "")


def _nearest(name: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else None
