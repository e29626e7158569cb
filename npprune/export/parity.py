"""ONNX Runtime against PyTorch on real images, and the gate that guards the final file name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from npprune.errors import ExportError, GateError, UsageError, plural
from npprune.export.onnx import frozen_copy, to_pixels
from npprune.export.session import Session, open_session
from npprune.records import ParityRow, Preprocessing

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn


@dataclass(frozen=True)
class Gate:
    """What a file must reach to be published.

    `tolerance`: largest relative logit error, None for no limit; `min_agreement`: share of images
    with the same top-1 as PyTorch; `max_drop`: percentage points of top-1 accuracy, where labels
    are known. `min_cosine`: of features, the least of all images.
    """

    tolerance: float | None = 1e-4
    min_agreement: float = 1.0
    max_drop: float | None = None
    min_cosine: float | None = None


GATES = {
    "fp32": Gate(),
    # Half precision keeps 11 bits, eight-bit integers 8: near-ties between classes may flip, so
    # these are judged by agreement and accuracy.
    "fp16": Gate(tolerance=5e-2, min_agreement=0.98, max_drop=0.5),
    "int8": Gate(tolerance=None, min_agreement=0.8, max_drop=1.0),
}


FEATURE_GATES = {
    "fp32": Gate(),
    "fp16": Gate(tolerance=5e-2, min_agreement=0.98, min_cosine=0.999),
    "int8": Gate(tolerance=None, min_agreement=0.8, min_cosine=0.9),
}
SAME = 1e-6  # cosines that differ by less are equal, as of two files with one picture


def gates(output: str) -> dict[str, Gate]:
    """By precision, of files that give logits or features."""
    return FEATURE_GATES if output == "features" else GATES


@dataclass(frozen=True)
class Parity:
    """How an ONNX file agrees with the network it came from.

    `torch_top1` and `onnx_top1` are shares of correct predictions, where labels were given.
    """

    rows: list[ParityRow]
    passed: bool
    gate: Gate
    provider: str
    reason: str
    failures: list[str] = field(default_factory=list)
    torch_top1: float | None = None
    onnx_top1: float | None = None
    providers: list[str] = field(default_factory=list)  # as the session reports them


def check_parity(
    model: nn.Module,
    onnx_path: Path,
    images: Tensor,
    *,
    batch_sizes: Sequence[int] = (1, 3, 17),
    provider: str = "cpu",
    threads: int | None = None,
    gate: Gate = GATES["fp32"],
    labels: Tensor | None = None,
    features: bool = False,
) -> Parity:
    """Run `onnx_path` on `images` [n, 3, H, W] at each batch size and compare with `model`.

    PyTorch's logits are computed once, in float32 on the CPU; ONNX Runtime gets all images in
    batches of exactly the size asked for, the last one filled up from the front. The error of a
    batch size is max |onnx - torch| over max |torch|, over all logits. `labels` [n], where known,
    add top-1 accuracies. The result says whether `gate` was passed, and if not, why.

    For a file with its preprocessing inside pass `pixel_input(model, ...)` and uint8 `images`
    [n, H, W, 3].
    """
    if len(images) == 0:
        raise UsageError("`images` must hold at least one image, got none")
    session = open_session(onnx_path, provider, threads, timed=False)
    if session.fixed_batch is not None:
        batch_sizes = (session.fixed_batch,)
    expected = torch_logits(model, images)
    pixels = images.cpu().numpy()
    rows, top1 = [], None
    for batch in batch_sizes:
        logits = batched_logits(session.run, pixels, batch)
        rows.append(compare_logits(batch, logits, expected, features=features))
        if labels is not None:
            share = float((logits.argmax(1) == labels.cpu().numpy()).mean())
            top1 = share if top1 is None else min(top1, share)
    reference = (
        None if labels is None else float((expected.argmax(1) == labels.cpu().numpy()).mean())
    )
    failures = failures_of(rows, gate)
    if gate.max_drop is not None and top1 is not None and reference is not None:
        drop = 100 * (reference - top1)
        if drop > gate.max_drop:
            failures.append(
                f"top-1 falls by {drop:.2f} points, from {100 * reference:.2f} % to "
                f"{100 * top1:.2f} %, at most {gate.max_drop:g} are allowed"
            )
    return Parity(
        rows, not failures, gate, session.provider, session.reason, failures, reference, top1,
        session.providers,
    )  # fmt: skip


def top1_score(
    images: Tensor, labels: Tensor, preprocessing: Preprocessing
) -> Callable[[Session], float]:
    """A score to choose between files by: the share of the normalised `images` [n, 3, H, W]
    whose top-1 is `labels` [n]. It feeds pixels where the file asks for them."""
    expected = labels.cpu().numpy()

    def score(session: Session) -> float:
        return float((logits_of(session, images, preprocessing).argmax(1) == expected).mean())

    return score


def logits_of(session: Session, images: Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """Logits [n, c] of normalised images [n, 3, H, W], whatever the file's input and batch."""
    if session.input_name == "pixels":
        images = to_pixels(images, preprocessing)
    return batched_logits(session.run, images.cpu().numpy(), session.fixed_batch or 16)


def require(parity: Parity, name: str) -> None:
    """GateError, with the numbers, where `parity` did not pass. `name`: of the file."""
    if not parity.passed:
        raise GateError(
            f"{name} does not agree with the PyTorch network on {parity.provider}: "
            + "; ".join(parity.failures),
            hint="no file was kept under that name",
        )


def torch_logits(model: nn.Module, images: Tensor, chunk: int = 16) -> np.ndarray:
    """PyTorch's logits [n, c], in float32 on the CPU in evaluation mode."""
    import numpy as np
    import torch

    frozen = frozen_copy(model)
    with torch.inference_mode():
        parts = [frozen(part.cpu()).numpy() for part in images.split(chunk)]
    return np.concatenate(parts)


def batched_logits(
    run: Callable[[np.ndarray], np.ndarray], images: np.ndarray, batch: int
) -> np.ndarray:
    """Logits [n, c] of all images, every run with exactly `batch` of them."""
    import numpy as np

    n = len(images)
    parts = [run(images[np.arange(start, start + batch) % n]) for start in range(0, n, batch)]
    return np.concatenate(parts)[:n]


def compare_logits(
    batch: int, logits: np.ndarray, expected: np.ndarray, *, features: bool = False
) -> ParityRow:
    """One row of the comparison: logits [n, c] (or features [n, ...]) got at batch size `batch`,
    and those expected."""
    import numpy as np

    if logits.shape != expected.shape:
        raise ExportError(
            f"the exported network must give logits of shape {expected.shape}, got {logits.shape}"
        )
    if not np.isfinite(logits).all() or not np.isfinite(expected).all():
        # JSON has no infinity: the largest float stands for "no agreement at all".
        error = float(np.finfo(np.float32).max)
    else:
        error = float(np.abs(logits - expected).max() / max(np.abs(expected).max(), 1e-30))
    if features:
        cosines = _cosines(logits, expected)
        own = cosines.diagonal()
        nearest = float((own >= cosines.max(1) - SAME).mean())
        return ParityRow(batch, len(logits), error, nearest, float(own.min()))
    agreement = float((logits.argmax(1) == expected.argmax(1)).mean())
    return ParityRow(batch, len(logits), error, agreement)


def cosine_score(
    model: nn.Module, images: Tensor, preprocessing: Preprocessing
) -> Callable[[Session], float]:
    """A score to choose between files of features by: the mean cosine to PyTorch's on the
    normalised `images` [n, 3, H, W]. It feeds pixels where the file asks for them."""
    expected = torch_logits(model, images)

    def score(session: Session) -> float:
        return float(
            _cosines(logits_of(session, images, preprocessing), expected).diagonal().mean()
        )

    return score


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of features [n, ...] with features [n, ...]: [n, n], 0 where one is not finite."""
    import numpy as np

    def unit(x: np.ndarray) -> np.ndarray:
        x = np.nan_to_num(x.reshape(len(x), -1).astype(np.float64), posinf=0.0, neginf=0.0)
        out: np.ndarray = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
        return out

    found: np.ndarray = unit(a) @ unit(b).T
    return found


def failures_of(rows: list[ParityRow], gate: Gate) -> list[str]:
    """Where rows miss a gate, in words; empty if nowhere."""
    said = []
    for row in rows:
        if gate.tolerance is not None and row.max_relative_error > gate.tolerance:
            said.append(
                f"relative {'logit ' if row.cosine is None else ''}error "
                f"{row.max_relative_error:.2e} at batch {row.batch}, "
                f"at most {gate.tolerance:.0e} is allowed"
            )
        if gate.min_cosine is not None and (row.cosine or 0.0) < gate.min_cosine:
            said.append(
                f"a cosine of {row.cosine:.4f} at batch {row.batch}, at least "
                f"{gate.min_cosine:g} is required"
            )
        if row.top1_agreement < gate.min_agreement:
            same = round(row.top1_agreement * row.images)
            what = "the same top-1" if row.cosine is None else "features nearest to their own"
            said.append(
                f"{what} on {same} of {plural(row.images, 'image')} at batch {row.batch}, "
                f"at least {100 * gate.min_agreement:g} % is required"
            )
    return said
