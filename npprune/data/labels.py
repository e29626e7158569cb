"""Which class index a folder (or a data set's own class name) means, and how classes are chosen.

Four rules, in this order: an explicit class map; the class names that the network brings; ImageNet
synsets or class names; rank in natural order, where no names are known.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from npprune.errors import DataError, setting
from npprune.records import ClassInfo
from npprune.untrusted import MAX_PIXELS, parse_json

SYNSET = re.compile(r"n\d{8}\Z")
RANKED = "folder rank"


@dataclass(frozen=True)
class KnownNames:
    """The class names that a network brings.

    classes: by label; a name that is only its index as text says nothing. within: the labels that
    the network still has, where its head was cut to some classes of its data; None: all. ranked:
    the names were once given by folder rank, so their order is a guess. class_map: the file that
    said the labels when the network was made.
    """

    classes: Sequence[ClassInfo]
    within: frozenset[int] | None = None
    ranked: bool = False
    class_map: str | None = None

    @property
    def named(self) -> list[ClassInfo]:
        """Those with a name."""
        return [c for c in self.classes if c.synset is not None or c.name != str(c.index)]


@dataclass(frozen=True)
class Asked:
    """What is asked of a source, whatever its kind: the keywords of `opening.open_source`."""

    num_classes: int | None = None
    class_map: str | Path | None = None
    known: KnownNames | None = None
    classes: Sequence[str | int] | str | None = None
    images_per_class: int | None = None
    max_pixels: int = MAX_PIXELS

    @property
    def some(self) -> bool:
        """Whether classes are chosen."""
        return self.classes is not None

    def chosen(self, labels: Labels, where: str) -> list[int] | None:
        """The labels of the chosen classes; None: all."""
        return None if self.classes is None else choose_classes(self.classes, labels, where=where)


@dataclass
class Labels:
    """A rule applied to the class names of one source."""

    rule: str  # for the reader of a result, e.g. "ImageNet synset folders"
    index: dict[str, int]  # class name in the source -> label
    classes: list[ClassInfo]  # the label space as far as known, by index
    aliases: dict[int, set[str]] = field(default_factory=dict)  # lower case; to choose by
    notes: list[str] = field(default_factory=list)
    within: frozenset[int] | None = None  # the labels that count; None: all
    text_order: dict[int, int] | None = None
    """Label -> label by the plain text order of names, where labels are ranks and those differ."""


def find_labels(
    names: Sequence[str],
    *,
    num_classes: int | None = None,
    class_map: str | Path | None = None,
    known: KnownNames | None = None,
    some: bool = False,
    images: Mapping[str, int] | None = None,
    ranked: str = RANKED,
    indices: bool = False,
    where: str = "",
) -> Labels:
    """The labels of a source whose classes are called `names`, in the source's own order.

    num_classes: outputs of the model; None: unknown, and synsets mean ImageNet-1k.
    known: the names that the network brings.
    some: classes are chosen later: a name that the network does not have is left out.
    images: how many images each name has, to be said where it is left out.
    ranked: what to call the rule when the label is the position in `names`.
    indices: `names` are no names, but the positions themselves.

    Each argument is a separate thing that decides the labels, so they are many.

    Names that are left out are missing in `index`.

    Raises:
        DataError: bad class map, a name without a label, synsets among other names, a label
            that the model has no output for.
    """
    place = f" in {where}" if where else ""
    if class_map is not None:
        labels = _mapped(names, Path(class_map), place)
    elif indices:
        labels = _ranked(names, ranked, num_classes)
    else:
        plain = partial(_unnamed, names, num_classes, ranked, place)
        labels = _by_known_names(names, known, num_classes, some, place, plain) or plain()
    if num_classes is not None:
        for name, label in labels.index.items():
            if label >= num_classes:
                raise DataError(
                    f"class `{name}`{place} has label {label} ({labels.rule}), and "
                    f"the model's labels are 0..{num_classes - 1}",
                    hint=f"use data of the model's classes, or {setting('data.class_map', 'FILE')}",
                )
        labels.classes = [c for c in labels.classes if c.index < num_classes]
    if known is not None:
        _complete(labels, known)
        if known.within is not None:
            _limit(labels, names, known, images or {}, place)
    for info in labels.classes:
        labels.aliases.setdefault(info.index, set()).add(info.name.lower())
        if info.synset:
            labels.aliases[info.index].add(info.synset)
    for name, label in labels.index.items():
        labels.aliases.setdefault(label, set()).add(name.lower())
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
    text = read_list(
        path, "class map", hint=f"{setting('data.class_map')} takes a .txt or .json file"
    )
    if path.suffix.lower() == ".json":
        return _json_map(text, path)
    if path.suffix.lower() != ".txt":
        raise DataError(
            f"class map must be a .txt or .json file, got `{path}`",
            hint="txt: one folder name per line; json: {folder: label}",
        )
    return _listed([line.strip() for line in text.rstrip().splitlines()], path)


def read_list(path: Path, what: str, *, hint: str | None = None) -> str:
    """The text of a file that a person wrote: UTF-8, with or without a byte order mark.

    Raises:
        DataError: it cannot be read, or is no UTF-8; `what` says what it is.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as err:
        raise DataError(f"cannot read {what} `{path}`: {err.strerror or err}", hint=hint) from err
    except UnicodeDecodeError as err:
        raise DataError(
            f"cannot read {what} `{path}`: it is not UTF-8 text", hint="save it as UTF-8"
        ) from err


def class_list(path: Path) -> list[str]:
    """The classes that a text file names, one a line."""
    return [line.strip() for line in read_list(path, "class file").splitlines() if line.strip()]


def _json_map(text: str, path: Path) -> dict[str, tuple[int, str | None]]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise DataError(f"class map `{path}` has the key `{key}` twice")
            seen[key] = value
        return seen

    try:
        data = parse_json(text, object_pairs_hook=once)
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
        elif key.isdecimal() and isinstance(value, str):
            folder, label, name = value, int(key), None
        elif (
            key.isdecimal()
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


def _by_known_names(
    names: Sequence[str],
    known: KnownNames | None,
    num_classes: int | None,
    some: bool,
    place: str,
    plain: Callable[[], Labels],
) -> Labels | None:
    """Labels by the names that the network brings; None where it brings none."""
    if known is None:
        return None
    named = known.named
    numbers = not named and all(name.isdecimal() for name in names)
    if numbers:  # as those of digits: a folder's number is a name, too
        named = list(known.classes)
    index = match_names(names, named)
    rest = [name for name in names if name not in index]
    partly = bool(index) and (some or known.within is not None)
    if not named or (numbers and rest and not partly):
        return None
    if rest and not partly:
        if index and len(named) < (num_classes or 0) and _agrees(named, index, labels := plain()):
            return labels
        raise _mismatch(names, rest, known, named, place)
    rule = "the network's class names" + (f", once given by {RANKED}" if known.ranked else "")
    labels = Labels(rule, index, list(named))
    if known.ranked and known.within is None:
        labels.text_order = _text_order([c.name for c in sorted(named, key=lambda c: c.index)])
    return labels


def match_names(names: Sequence[str], classes: Sequence[ClassInfo]) -> dict[str, int]:
    """Name -> label where exactly one class is called so, and no other of `names` means it.

    By name or synset; then without regard to case and Unicode form, or a part of the ImageNet
    description.
    """
    called = (*names, *(c.name for c in classes), *(c.synset for c in classes if c.synset))
    lemmas = _lemmas() if any(SYNSET.match(name) for name in called) else {}

    def loose(text: str) -> set[str]:
        forms = {text} | _parts(lemmas.get(text, ""))
        return {unicodedata.normalize("NFC", form).casefold() for form in forms}

    exact: dict[str, set[int]] = {}
    near: dict[str, set[int]] = {}
    for c in classes:
        for form in {c.name} | ({c.synset} if c.synset else set()):
            exact.setdefault(form, set()).add(c.index)
        for form in loose(c.name) | (loose(c.synset) if c.synset else set()):
            near.setdefault(form, set()).add(c.index)
    index = {name: min(exact[name]) for name in names if len(exact.get(name, ())) == 1}
    for name in names:
        hits = set().union(*(near.get(form, set()) for form in loose(name)))
        if name not in exact and len(hits - set(index.values())) == 1 == len(hits):
            index[name] = hits.pop()
    count = Counter(index.values())
    return {name: label for name, label in index.items() if count[label] == 1}


def _agrees(named: Sequence[ClassInfo], index: Mapping[str, int], labels: Labels) -> bool:
    """Whether labels found without the network's names fit those that it has for some outputs."""
    taken = {c.index for c in named}
    return all(
        index[name] == label if name in index else label not in taken
        for name, label in labels.index.items()
    )


def _mismatch(
    names: Sequence[str],
    rest: Sequence[str],
    known: KnownNames,
    named: Sequence[ClassInfo],
    place: str,
) -> DataError:
    ours, left = [n for n in names if n not in rest], set(rest)
    verb = "is" if len(rest) == 1 else "are"
    here = f"; the other names{place}: {_few(ours)}" if ours else ""
    if known.class_map is not None:
        made_with = setting("data.class_map", known.class_map)
        hint = f"the network was made with {made_with}: give it here too"
    else:
        hint = f"{setting('data.class_map', 'FILE')} says the class of every name"
    if ours and len(ours) <= 20 and not any(re.search(r"[\s,]", name) for name in ours):
        hint += f"; {setting('data.classes', ','.join(ours))} leaves the others out"
    return DataError(
        f"{_few([n for n in names if n in left])}{'' if here else place} {verb} none of the "
        f"network's {len(named)} classes: {_few([c.name for c in named])}{here}",
        hint=hint,
    )


def _few(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"`{name}`" for name in names[:most]) + more


def _complete(labels: Labels, known: KnownNames) -> None:
    """Add what the network calls the classes that the rule gave no name."""
    classes = {c.index: c for c in (*labels.classes, *known.named)}
    classes.update({c.index: c for c in KnownNames(labels.classes).named})
    labels.classes = [classes[i] for i in sorted(classes)]


def _limit(
    labels: Labels,
    names: Sequence[str],
    known: KnownNames,
    images: Mapping[str, int],
    place: str,
) -> None:
    """Leave out what is not of the classes that the network's head was cut to."""
    assert known.within is not None
    labels.within, labels.text_order = known.within, None
    labels.index = {n: label for n, label in labels.index.items() if label in known.within}
    out = [name for name in names if name not in labels.index]
    ours = [c.name for c in labels.classes if c.index in known.within]
    if not labels.index:
        raise DataError(
            f"no class{place} is one of the {len(known.within)} that the network's head was cut "
            f"to: {_few(ours)}; there are {_few(list(names))}",
            hint="give images of those classes, or say every label with "
            f"{setting('data.class_map', 'FILE')}",
        )
    if out:
        count = sum(images.get(name, 0) for name in out)
        labels.notes.append(
            f"left out: {_few(out)}{f', with {count} images' if images else ''}: the network's "
            f"head was cut to {_few(ours)}"
        )


def _unnamed(names: Sequence[str], num_classes: int | None, ranked: str, place: str) -> Labels:
    """Labels where nothing says how the network calls its classes."""
    imagenet = None
    if any(SYNSET.match(name) for name in names):
        imagenet = _imagenet(num_classes)
        if imagenet is not None:
            return _synsets(names, imagenet, place)
    elif num_classes is not None and len(names) < num_classes and ranked == RANKED:
        imagenet = _imagenet(num_classes)
    if imagenet is not None:
        classes = _imagenet_classes(imagenet)
        index = match_names(names, classes)
        if len(index) == len(names):
            return Labels("ImageNet class names", index, classes)
    return _ranked(names, ranked, num_classes)


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
                hint=f"move it away, or say every label with {setting('data.class_map', 'FILE')}",
            )
        if name not in known:
            raise DataError(
                f"class `{name}`{place} is not one of the {len(known)} ImageNet synsets of the "
                "model",
                hint=f"move it away, or say every label with {setting('data.class_map', 'FILE')}",
            )
    lemmas = {synset: imagenet.label_name_to_description(synset) for synset in known}
    return Labels(
        "ImageNet synset folders",
        {name: known[name] for name in names},
        _imagenet_classes(imagenet),
        {i: _parts(lemmas[synset]) for synset, i in known.items()},
    )


def _imagenet_classes(imagenet: Any) -> list[ClassInfo]:
    return [
        ClassInfo(i, _short(imagenet.label_name_to_description(synset)), synset)
        for i, synset in enumerate(imagenet.label_names())
    ]


def _ranked(names: Sequence[str], ranked: str, num_classes: int | None) -> Labels:
    notes = []
    order = _text_order(names) if ranked == RANKED else None
    if ranked == RANKED:
        if all(name.isdecimal() for name in names) and any(
            int(name) != rank for rank, name in enumerate(names)
        ):
            notes.append(
                "the class folders are numbers, but labels are their ranks: "
                f"`{names[-1]}` has label {len(names) - 1}; "
                "a class map (--class-map FILE) says otherwise"
            )
        elif num_classes is not None and num_classes != len(names):
            notes.append(
                f"labels are folder ranks 0..{len(names) - 1}, and the model has {num_classes} "
                "classes; a class map (--class-map FILE) says otherwise"
            )
    if order is not None:
        notes.append(_two_orders(names))
    return Labels(
        ranked,
        {name: rank for rank, name in enumerate(names)},
        [ClassInfo(rank, name) for rank, name in enumerate(names)],
        notes=notes,
        text_order=order,
    )


def _text_order(names: Sequence[str]) -> dict[int, int] | None:
    """Rank -> rank in plain text order, as torchvision sorts; None where both are the same."""
    text = {name: rank for rank, name in enumerate(sorted(names))}
    order = {rank: text[name] for rank, name in enumerate(names)}
    return order if any(a != b for a, b in order.items()) else None


def _two_orders(names: Sequence[str]) -> str:
    text = sorted(names)
    first = next(i for i, (a, b) in enumerate(zip(names, text, strict=True)) if a != b)
    cut = slice(max(0, first - 1), first + 3)
    dots = ["", ", ..."][first + 3 < len(names)], ["", "..., "][first > 1]
    natural, plain = (dots[1] + ", ".join(order[cut]) + dots[0] for order in (list(names), text))
    return (
        f"labels are folder ranks in natural order ({natural}), as timm counts; in plain text "
        f"order, as torchvision counts, the classes are {plain}: if the network was trained so, "
        "name them in that order in a class map (--class-map FILE), one per line"
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
        return list(class_list(path))
    if path.suffix == ".txt" or "/" in text:
        raise DataError(
            f"class file `{text}` does not exist", hint="one index, synset or name per line"
        )
    if any(text.lower() in names for names in labels.aliases.values()):
        return [text]  # a name may hold commas
    return [part.strip() for part in text.split(",") if part.strip()]


def _one(token: str | int, labels: Labels, where: str) -> int:
    place = f" of {where}" if where else ""
    text = str(token).strip().lower()
    within = labels.within
    known = {i.index: i for i in labels.classes if within is None or i.index in within}
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
    if within is not None:
        some = _few([info.name for info in known.values()])
        raise DataError(
            f"class `{token}` is not one of the {len(within)} that the network's head was cut to: "
            f"{some}",
            hint="leave `--classes` out, or choose among those of the checkpoint",
        )
    if re.fullmatch(r"-?\d+", text):
        low, high = min(known, default=0), max(known, default=0)
        raise DataError(f"class index `{token}` must be one of {low}..{high}{place}")
    names = sorted(set().union(*labels.aliases.values())) if labels.aliases else []
    how = "classes are indices, synsets or names, separated by commas, or a file with one per line"
    raise DataError(f"unknown class `{token}`{place}", hint=_nearest(text, names) or how)


def _shown(info: ClassInfo) -> str:
    return f"{info.index} {info.name}" + (f" ({info.synset})" if info.synset else "")


def _nearest(name: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else None
