"""The model card of a checkpoint: `README.md` with Hugging Face's metadata at its head."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from npprune.files import CARD_MARK
from npprune.records import CheckpointConfig, Evaluation, FeatureEvaluation, Variant
from npprune.report import features, text
from npprune.report.markdown import code, escape


def render_card(variant: Variant, config: CheckpointConfig) -> str:
    """The card of a pruned network, as far as it was measured. A pure function.

    No file says the licence of the dense weights: the card calls it unknown, and warns.
    """
    source, size = config.source, config.preprocessing.input_size[1:]
    parts = [
        f"---\n{_metadata(variant, config)}---",
        CARD_MARK,
        f"# {escape(variant.name)}",
        f"{code(source.architecture)}, pruned by npprune: {text.params(variant.model.params)} "
        f"parameters and {text.macs(variant.model.macs)} MACs for an image of "
        f"{size[0]}x{size[1]} pixels.",
        "> **Licence: unknown.** It depends on that of the dense weights and of the images that "
        "were used. Look them up before you share this network, and set `license` above.",
    ]
    if variant.evaluation is not None:
        parts += ["## What was measured", _measured(variant.evaluation)]
    elif variant.features is not None:
        parts += ["## What was measured", _measured_features(variant.features)]
    how = [
        f"criterion {code(variant.prune.criterion)}, selection {code(variant.prune.selection)}, "
        f"compensation {code(variant.prune.compensation)}",
        f"{text.count(sum(variant.prune.widths))} of {text.count(sum(variant.prune.dense_widths))} "
        "hidden units stay",
        f"dense weights: sha256 {code(source.sha256 or 'not known')}",
        f"weights: sha256 {code(config.weights_sha256)}",
    ]
    parts += [
        "## Load it",
        "In the folder above this one:\n\n```python\nimport npprune\n\nmodel = "
        f'npprune.load_model("{_plain(variant.name)}")\n```',
        "It takes images prepared as `config.json` says: "
        f"{escape(text.preprocessing(config.preprocessing))}.",
        "## How it was made",
        "\n".join(f"- {line}" for line in how),
    ]
    return "\n\n".join(parts) + "\n"


def is_card(content: str) -> bool:
    """Whether a README.md is one of these, and may be replaced."""
    return CARD_MARK in content


def _metadata(variant: Variant, config: CheckpointConfig) -> str:
    import yaml

    architecture = config.source.architecture
    data: dict[str, Any] = {
        "library_name": "timm",
        "license": "unknown",
        "pipeline_tag": "image-classification"
        if config.num_classes
        else "image-feature-extraction",
        "tags": ["npprune", "pruned"],
    }
    dense = config.details.get("dense", {})
    if dense.get("name") == architecture and not dense.get("checkpoint"):
        # the hub's own weights; what a file or another checkpoint came from is not known
        data["base_model"] = architecture if "/" in architecture else f"timm/{architecture}"
    if (e := variant.evaluation) is not None:
        metrics = [
            {"type": "accuracy", "name": "top-1", "value": round(e.pruned.top1.value, 6)},
            {"type": "accuracy", "name": "top-5", "value": round(e.pruned.top5.value, 6)},
        ]
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": _dataset(e), "type": "imagefolder"},
            "metrics": metrics,
        }
        data["model-index"] = [{"name": variant.name, "results": [result]}]
    dumped: str = yaml.safe_dump(data, sort_keys=True, allow_unicode=True)
    return dumped


def _measured(e: Evaluation) -> str:
    rows = [
        ("top-1", text.rate(e.dense.top1), text.rate(e.pruned.top1)),
        ("top-5", text.rate(e.dense.top5), text.rate(e.pruned.top5)),
    ]
    table = "\n".join(f"| {name} | {dense} | {pruned} |" for name, dense, pruned in rows)
    said = (
        f"On {text.plural(e.data.images, 'image')} of {code(_dataset(e))}, labels by "
        f"{escape(e.data.label_rule)}; 95 % intervals. Same top-1 as the dense network: "
        f"{text.rate(e.agreement)}."
    )
    doubt = f"\n\n> {escape(e.label_doubt)}" if e.label_doubt else ""
    return f"| | dense | pruned |\n| --- | --- | --- |\n{table}\n\n{said}{doubt}"


def _measured_features(e: FeatureEvaluation) -> str:
    rows = "\n".join(
        f"| {label} | {dense.text} | {pruned.text} |"
        for label, dense, pruned, _ in features.rows(e)
    )
    said = f"On {text.plural(e.data.images, 'image')} of {code(_dataset(e))}; 95 % intervals."
    return f"| | dense | pruned |\n| --- | --- | --- |\n{rows}\n\n{said} {features.EXPLAINED}"


def _dataset(e: Evaluation | FeatureEvaluation) -> str:
    """The source without folders of the machine that measured."""
    kind, colon, path = e.data.spec.partition(":")
    return f"{kind}:{PurePath(path).name}" if colon and kind == "folder" else e.data.spec


def _plain(name: str) -> str:
    """A folder's name within a Python string of a code block."""
    return text.clean(name).replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\x60")
