"""A result as a real run leaves it, made of fixed numbers: 12 blocks, 800 images, 1,000 classes."""

from __future__ import annotations

import base64
import math
import random

from npprune.records import (
    Accuracy,
    ClassInfo,
    ClassRow,
    ConfidenceBin,
    DataInfo,
    DiscoverySummary,
    Environment,
    Evaluation,
    ExportRecord,
    FlippedImage,
    Histogram,
    Latency,
    Mean,
    ModelInfo,
    ModelSource,
    Outcomes,
    ParityRow,
    Preprocessing,
    PruneSummary,
    Rate,
    Reliability,
    Result,
    Variant,
)

WORDS = "great white|hammer|grey|tabby|golden|river|mountain|paper|steam|garden|velvet|copper"
THINGS = "shark|retriever|terrier|clock|bridge|cup|engine|beetle|owl|boat|lamp|fungus|kite"


def rate(correct: int, total: int) -> Rate:
    """A rate with its Wilson interval."""
    z, p = 1.96, correct / total
    center = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return Rate(correct, total, p, max(0.0, center - half), min(1.0, center + half))


def mean(value: float, error: float, n: int = 800) -> Mean:
    """A mean with its interval."""
    return Mean(value, error, value - 1.96 * error, value + 1.96 * error, n)


def classes() -> list[ClassInfo]:
    """A thousand names."""
    words, things = WORDS.split("|"), THINGS.split("|")
    return [
        ClassInfo(i, f"{words[i % 12]} {things[(i // 12) % 13]} {i // 156 + 1}", f"n{i:08d}")
        for i in range(1000)
    ]


def preprocessing() -> Preprocessing:
    """That of a timm model."""
    return Preprocessing()


def data(spec: str, images: int, **more: object) -> DataInfo:
    """A source of images."""
    return DataInfo(
        spec, "ImageNet synset folders", images, min(images, 1000), sha256=_hash(spec), **more
    )  # type: ignore[arg-type]


def _hash(text: str) -> str:
    return "".join(f"{random.Random(text + str(i)).randrange(16):x}" for i in range(64))


def model(widths: list[int], share: float) -> ModelInfo:
    """ViT-Ti, or a part of it."""
    source = ModelSource(
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        checkpoint="vit_tiny.safetensors",
        sha256=_hash("weights"),
    )
    return ModelInfo(
        source,
        params=int(2_180_000 + 3_537_416 * share),
        macs=int(538_000_000 + 720_000_000 * share),
        widths=widths,
        heads=[3] * 12,
        embed_dim=192,
        num_classes=1000,
        scope="cls",
        preprocessing=preprocessing(),
    )


def discovery(classes_drawn: int = 20) -> DiscoverySummary:
    """Paths of a thousand images."""
    rng = random.Random(3)
    frequency = []
    for _ in range(12):
        shares = sorted((rng.random() ** 3 * 0.8 for _ in range(30)), reverse=True)
        frequency.append(list(zip(rng.sample(range(768), 30), shares, strict=True)))
    common = [[n for n, _ in block[:4]] for block in frequency]
    paths = {
        label * 37: [
            [rng.choice([*common[b], rng.randrange(768)]), *rng.sample(range(768), 4)]
            for b in range(12)
        ]
        for label in range(classes_drawn)
    }
    return DiscoverySummary(
        "neuron-path",
        "cls",
        "gauss-legendre",
        5,
        5,
        "sum",
        data("folder:imagenet/train", 1000, skipped=["imagenet/train/n00000003/broken.JPEG"]),
        1000,
        1000,
        412.5,
        mean(0.4321, 0.011, 1000),
        frequency,
        paths,
    )


def latency(batch: int, dense: float, ratio: float, runtime: str = "onnxruntime") -> Latency:
    """A paired timing."""
    return Latency(
        runtime,
        "CPUExecutionProvider" if runtime == "onnxruntime" else "cpu",
        batch,
        2,
        50,
        dense,
        dense * ratio,
        dense * 0.04,
        dense * 0.03,
        ratio,
        ratio - 0.02,
        ratio + 0.03,
    )


def evaluation(top1: int = 496, top5: int = 668) -> Evaluation:
    """Dense and pruned on 800 images."""
    rng = random.Random(top1)
    rows = []
    for info in classes()[:800:4]:
        dense = rng.choice([1.0, 1.0, 1.0, 0.75, 0.75, 0.5])
        pruned = max(0.0, dense - rng.choice([0, 0, 0.25, 0.25, 0.5, -0.25, 1.0]))
        rows.append(ClassRow(info.index, info.name, 4, dense, min(pruned, 1), pruned - dense - 0.1))
    pruned = Accuracy(rate(top1, 800), rate(top5, 800), mean(top1 / 800 * 0.83, 0.0141))
    change = (top1 - 660) / 800
    return Evaluation(
        data("folder:imagenet/val", 800),
        preprocessing(),
        "cpu",
        Accuracy(rate(660, 800), rate(752, 800), mean(0.7431, 0.0113)),
        pruned,
        mean(-0.312, 0.0138),
        mean(-0.309, 0.0121, 200),
        (top1 - 660) / 660,
        mean(change, 0.0148),
        rate(524, 800),
        rows,
        latency=[latency(1, 14.2, 0.81, "torch")],
        seconds=61.0,
    )


def seen(done: Evaluation, seed: int = 0, images: int = 24) -> Evaluation:
    """The same with what is recorded image by image: of every third image the dense network is
    wrong; the pruned one is right on some of these, and wrong on others."""
    rng = random.Random(seed)
    dense = [i % 3 != 0 for i in range(images)]
    pruned = [right != (rng.random() < 0.3) for right in dense]
    done.outcomes = Outcomes(images, "list", packed(dense), packed(pruned))
    done.flipped = [
        FlippedImage("great white", PNG, True, "great white", 0.91, "hammer", 0.42),
        FlippedImage("tabby", PNG, False, "grey", 0.33, "tabby", 0.51),
    ]
    bins = [ConfidenceBin(0.25, rate(4, 12)), ConfidenceBin(0.9, rate(9, 12))]
    done.dense_reliability = Reliability(0.117, bins)
    done.pruned_reliability = Reliability(0.031, bins[:1])
    done.deviations = Histogram([-1.0, -0.5, 0.0], [3, 9, 12])
    return done


def packed(right: list[bool]) -> str:
    """A bit an image, the first one highest."""
    padded = [*right, *[False] * (-len(right) % 8)]
    number = int("".join("01"[r] for r in padded), 2)
    return base64.b64encode(number.to_bytes(len(padded) // 8, "big")).decode()


PNG = (  # one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJg"
    "gg=="
)


def variant(name: str = "vit_tiny_half", keep: float = 0.5, top1: int = 496) -> Variant:
    """A pruned network with everything measured."""
    base = [480, 384, 384, 384, 384, 480, 384, 384, 480, 384, 384, 96]
    widths = [max(16, min(768, round(w * keep / 0.5 / 16) * 16)) for w in base]
    prune = PruneSummary(
        "obs-curvature",
        "measured",
        "least-squares",
        keep,
        5,
        16,
        widths,
        [768] * 12,
        [min(w, 60 + 11 * b) for b, w in enumerate(widths)],
        data("folder:imagenet/train", 1000),
        184.0,
        _hash("plan" + name),
        predicted={"top1": 0.632, "top1_drop": 0.197},
        details={"shrinkage": [1e-3] * 12, "condition": [1.2e5] * 12, "refit": True},
    )
    export = ExportRecord(
        "model.onnx",
        "onnx",
        "fp32",
        20,
        int(4 * 2_180_000 + 4 * 3_537_416 * keep),
        _hash("onnx"),
        "CPUExecutionProvider",
        [ParityRow(b, b, 2.1e-6 * (1 + b / 20), 1.0) for b in (1, 3, 17)],
        1e-4,
        True,
        dense_bytes=22_880_114,
        latency=[latency(1, 9.84, 0.69), latency(16, 121.0, 0.66)],
    )
    done = evaluation(top1)
    return Variant(name, f"../../ckpt/{name}", model(widths, keep), prune, done, export)


def result(variants: list[Variant] | None = None) -> Result:
    """A whole run: paths found, one network pruned, evaluated and exported."""
    return Result(
        "vit_tiny",
        "2026-01-02T03:04:05Z",
        Environment(
            {"npprune": "0.1.0", "torch": "2.6.0", "timm": "1.0.20", "onnxruntime": "1.20.1"},
            "cpu",
            "no CUDA device",
            2,
            "Linux-6.1-x86_64",
            0,
        ),
        model([768] * 12, 1.0),
        classes(),
        discovery(),
        [variant()] if variants is None else variants,
        commands=[
            "npprune discover vit_tiny_patch16_224.augreg_in21k_ft_in1k "
            "--data folder:imagenet/train --topk 5 --out reports/vit_tiny",
            "npprune prune reports/vit_tiny --topk 5 --keep 0.5 --out ckpt/vit_tiny_half",
        ],
    )
