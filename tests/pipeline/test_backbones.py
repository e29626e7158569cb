"""The line for a network without a classifier: pruned, measured, healed, exported by features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import npprune
from npprune.api.held import in_memory
from npprune.cli.app import run_app
from npprune.core import metrics, probes
from npprune.data.given import Given
from npprune.errors import DataError, ModelError, NpPruneError
from npprune.models.probe import read_probe, with_probe
from npprune.models.surgery import mask_plan
from npprune.models.view import outputs_of
from npprune.pipeline.common.inputs import open_images
from npprune.pipeline.common.processes import Processes
from npprune.pipeline.common.work import Work
from npprune.pipeline.evaluate.features import compared_features, see_features
from npprune.pipeline.verify import verify
from npprune.recipe import DataSection
from npprune.records import FeatureEvaluation
from npprune.store.runs import RunFolder
from tests.helpers.processes import Team
from tests.helpers.tiny import tiny_vit

SMALL: dict[str, Any] = {"round_to": 2, "min_keep": 2}


def patterns(n: int, seed: int) -> Tensor:
    """Images [n, 3, 16, 16] of a few smooth shapes, with noise."""
    g = torch.Generator().manual_seed(seed)
    shapes = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mixed = torch.einsum("nk,kchw->nchw", torch.randn(n, 6, generator=g), shapes)
    smooth = nn.functional.interpolate(mixed, (16, 16), mode="bilinear")
    return smooth + 0.1 * torch.randn(n, 3, 16, 16, generator=g)


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    return tiny_vit(num_classes=0, mlp_ratio=4).float()


@pytest.fixture(scope="module")
def half(backbone: nn.Module) -> npprune.Pruned:
    return npprune.prune(backbone, patterns(96, 1), target_macs=0.5, progress=False, **SMALL)


def distances(dense: nn.Module, pruned: nn.Module) -> Tensor:
    x = patterns(64, 2)
    with torch.no_grad():
        return metrics.feature_distances(outputs_of(dense, x), outputs_of(pruned, x)).mean(0)


def test_features_stay_nearer_than_by_variance_and_least_squares(
    backbone: nn.Module, half: npprune.Pruned
) -> None:
    assert half.cost.dense_macs is not None
    assert half.cost.macs <= 0.5 * half.cost.dense_macs
    plain = npprune.prune(
        backbone, patterns(96, 1), target_macs=0.5, criterion="variance", selection="uniform",
        compensation="least-squares", axes=["mlp"], progress=False, **SMALL,
    )  # fmt: skip
    ours, theirs = distances(backbone, half.model), distances(backbone, plain.model)
    assert bool((ours[[0, 2]] > theirs[[0, 2]]).all())  # cosines
    assert bool((ours[[1, 3]] < theirs[[1, 3]]).all())  # errors
    assert float(ours[0]) == pytest.approx(half.predicted["cosine"], abs=0.02)


def test_masked_equals_removed(backbone: nn.Module) -> None:
    plan = npprune.Plan(
        keep=[[0, 3, 9], list(range(96)), [5, 7]], widths=[96] * 3, heads=[[0, 2], [1], [0, 1, 2]],
        merged=[3, 0, 0],
    )  # fmt: skip
    x = patterns(3, 3)
    with torch.no_grad():
        removed = outputs_of(npprune.apply_plan(backbone, plan), x)
        masked = outputs_of(mask_plan(backbone, plan), x)
    assert removed.shape == (3, 17, 24)  # every patch keeps a feature where tokens merged
    torch.testing.assert_close(removed, masked, rtol=1e-4, atol=1e-4)


def test_a_network_in_memory_goes_the_whole_line(
    backbone: nn.Module, half: npprune.Pruned, tmp_path: Path
) -> None:
    images = patterns(40, 4)
    labels = (images.mean((1, 2, 3)) > 0).long()
    found = npprune.evaluate(half, (images, labels), latency=False, progress=False)
    assert isinstance(found, FeatureEvaluation)
    near = found.agreement
    assert near.cosine.n == 40
    assert near.cosine.low < near.cosine.value < near.cosine.high < 1
    assert [p.name for p in found.probes] == ["k-NN", "ridge probe"]
    alone = npprune.evaluate(half, images, latency=False, progress=False)
    assert isinstance(alone, FeatureEvaluation)
    assert alone.probes == []
    assert alone.agreement.cosine.value == pytest.approx(near.cosine.value)

    folder = npprune.save(half, tmp_path / "half")
    again = npprune.load(folder)
    assert torch.equal(outputs_of(again.model, images[:2]), outputs_of(half.model, images[:2]))
    assert verify(folder).damaged == {}
    before = distances(backbone, again.model)
    healed = npprune.heal(again, patterns(96, 5), dense=backbone, epochs=6, lr=2e-4, progress=False)
    assert healed.unit == "relative error"
    assert healed.after.divergence_nats < healed.before.divergence_nats
    assert healed.after.agreement > healed.before.agreement
    assert float(distances(backbone, again.model)[1]) < float(before[1])
    twice = npprune.prune(again.model, images, keep=0.5, progress=False, **SMALL)
    assert sum(twice.plan.kept_widths) < sum(half.plan.kept_widths)


@pytest.mark.parametrize(
    ("what", "shape"),
    [
        pytest.param("pooled", (3, 24), marks=pytest.mark.slow),
        pytest.param("cls", (3, 24), marks=pytest.mark.slow),
        pytest.param("patches", (3, 24, 4, 4), marks=pytest.mark.slow),
    ],
)
def test_a_file_gives_the_features_asked_for(
    what: Any, shape: tuple[int, ...], half: npprune.Pruned, tmp_path: Path
) -> None:
    gives_features(half, half.model, what, shape, tmp_path / "f.onnx")


def test_a_file_gives_the_patches_where_no_token_merges(
    backbone: nn.Module, tmp_path: Path
) -> None:
    gives_features(backbone, backbone, "patches", (3, 24, 4, 4), tmp_path / "f.onnx")


def gives_features(
    subject: Any, network: nn.Module, what: Any, shape: tuple[int, ...], file: Path
) -> None:
    images = patterns(5, 5)
    record = npprune.export(
        subject, file, images, features=what, latency=False, provider="cpu", progress=False
    )
    assert record.details["features"] == what
    assert all(row.cosine is not None and row.cosine > 0.99999 for row in record.parity)
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(["features"], {"images": images[:3].numpy()})
    assert found.shape == shape
    with torch.no_grad():
        expected = outputs_of(network, images[:3])
    rows = found.reshape(3, 24, -1).swapaxes(1, 2)
    wanted = expected[:, :1] if what != "patches" else expected[:, 1:]
    np.testing.assert_allclose(rows, wanted.numpy(), rtol=1e-3, atol=1e-4)


class Exchange(Processes):
    """One process of two whose peer's part is there already."""

    parts: list[Any]

    def gathered(self, mine: Any) -> list[Any]:
        self.parts.append(mine)
        return self.parts


def test_two_processes_see_the_features_of_one(backbone: nn.Module, half: npprune.Pruned) -> None:
    data = (patterns(45, 4), torch.arange(45) // 15)  # the last batch is smaller
    one = npprune.evaluate(half, data, latency=False, batch_size=8, progress=False)
    dense, pruned = in_memory(backbone), in_memory(half)
    parts: list[Any] = []
    for rank in (1, 0):
        work = Work(emit=lambda event: None)
        work.team = Exchange(rank, 2)
        object.__setattr__(work.team, "parts", parts)
        work.held.images["memory:val"] = Given(data, None, True)
        images = open_images(
            "memory:val", DataSection(batch_size=8), dense.info, work, asked="data.val",
            on_bad="error",
        )  # fmt: skip
        seen = see_features(dense, pruned, images, work)
    assert [sum(map(len, part.labels)) for part, _ in parts] == [21, 24]
    found, labels, sample = seen.joined(images)
    assert torch.equal(labels, data[1])
    assert torch.equal(sample, data[0][:8])
    two = compared_features(found, labels, images)
    assert isinstance(one, FeatureEvaluation)
    assert two.agreement == one.agreement
    assert two.probes == one.probes
    assert len(two.probes) == 2


@pytest.mark.slow
def test_eval_of_features_by_two_processes_of_gloo(
    backbone: nn.Module, half: npprune.Pruned, tmp_path: Path
) -> None:
    npprune.save(backbone, tmp_path / "dense")
    npprune.save(half, tmp_path / "half")
    folder_of(patterns(45, 6), tmp_path / "images")
    args = [
        "eval", str(tmp_path / "half"), "--dense", str(tmp_path / "dense"), "--data",
        f"folder:{tmp_path / 'images'}", "--batch-size", "8", "--no-latency", "--json",
        "--device", "cpu",
    ]  # fmt: skip
    (tmp_path / "one").mkdir()
    found = []
    for root, count in ((tmp_path / "one", 1), (tmp_path, 2)):
        team = Team(root, args, count)
        assert team.end() == [0] * count, team.text("err0")
        found.append(json.loads(team.text("out0")))
    assert found[0]["data"]["images"] == 45
    for each in found:
        del each["seconds"]
    assert found[0] == found[1]


def folder_of(images: Tensor, path: Path) -> None:
    path.mkdir()
    for i, image in enumerate(images):
        pixels = ((image.clamp(-2, 2) + 2) * 63).permute(1, 2, 0).byte().numpy()
        Image.fromarray(pixels).save(path / f"{i:03d}.png")


def test_the_commands_on_images_without_labels(
    backbone: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(backbone.state_dict(), tmp_path / "w.safetensors")
    folder_of(patterns(48, 6), tmp_path / "images")
    checkpoint, images = str(tmp_path / "half"), f"folder:{tmp_path / 'images'}"
    network = ["auto", "--checkpoint", str(tmp_path / "w.safetensors"), "--num-heads", "3"]
    assert run_app([
        "prune", *network, "--calibration", images, "--target-macs", "0.6", "--out", checkpoint,
        "--round-to", "2", "--min-keep", "2", "--axes", "mlp",
    ]) == 0  # fmt: skip
    said = capsys.readouterr()
    assert "features, pooled" in said.out
    assert "no classifier: what counts are its features" in said.err
    assert run_app(["eval", checkpoint, "--data", images, "--no-latency"]) == 0
    said = capsys.readouterr()
    assert "Cosine to dense, patch tokens" in said.out
    assert "op-1" not in said.out
    assert run_app(["report", checkpoint]) == 0
    for name in ("report.html", "report.md"):
        text = (Path(checkpoint) / name).read_text()
        assert "Cosine to dense, pooled vector" in text
        assert "has not been measured" not in text
    assert "image-feature-extraction" in (Path(checkpoint) / "README.md").read_text()
    variant = RunFolder(Path(checkpoint)).read_result().variants[0]
    assert variant.evaluation is None
    assert variant.features is not None
    assert variant.features.data.classes == 0


@pytest.mark.parametrize(
    ("command", "said", "hint"),
    [
        (["prune", "--max-drop", "2"], "points of top-1", "target_macs"),
        (["prune", "--target-macs", "0.5", "--axes", "cls"], "every token", ""),
        (["export", "--features", "pooled", "--max-drop", "2"], "points of top-1", "leave it out"),
        (["export", "--format", "transformers"], "has no classifier", "onnx"),
    ],
)
def test_what_needs_a_classifier_is_refused(
    command: list[str], said: str, hint: str, backbone: nn.Module, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    save_file(backbone.state_dict(), tmp_path / "w.safetensors")
    folder_of(patterns(4, 6), tmp_path / "images")
    verb, *options = command
    source = "--calibration" if verb == "prune" else "--data"
    out = tmp_path / ("out.onnx" if "--features" in options else "out")
    code = run_app([
        verb, "auto", "--checkpoint", str(tmp_path / "w.safetensors"), "--num-heads", "3",
        source, f"folder:{tmp_path / 'images'}", "--out", str(out), *options,
    ])  # fmt: skip
    shown = capsys.readouterr().err
    assert code == 2
    assert said in shown
    assert hint.replace("_", "-") in shown


def test_paths_are_those_of_a_probe_that_stays_with_the_run(
    backbone: nn.Module, tmp_path: Path
) -> None:
    images = patterns(24, 7)
    labels = (images.mean((1, 2, 3)) > 0).long()
    run = tmp_path / "run"
    found = npprune.discover(backbone, (images, labels), out=run, topk=2, progress=False)
    weight, bias = read_probe(run / "probe.safetensors")
    network = with_probe(backbone, weight, bias)
    with torch.no_grad():
        right = (network(images).argmax(1) == labels).double().mean()
    assert right > 0.8
    order = [int(name) for name in found.ids]
    expected = npprune.discover_paths(network, images[order], labels[order], topk=2)
    assert torch.equal(found.neurons, expected.neurons)
    again = npprune.discover(backbone, (images, labels), out=run, topk=2, progress=False)
    assert torch.equal(again.neurons, found.neurons)
    pruned = npprune.prune(backbone, paths=run, keep=0.5, images=images, progress=False, **SMALL)
    assert pruned.plan.how["paths"]
    assert outputs_of(pruned.model, images[:1]).shape == (1, 17, 24)
    with pytest.raises(DataError, match="they need images with labels") as err:
        npprune.discover(backbone, images, progress=False)
    assert "one folder a class" in str(err.value.hint)
    with pytest.raises(ModelError, match="has no classifier"):
        npprune.discover_paths(backbone, images, labels)


def test_features_of_a_classifier_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NpPruneError, match=r"is for networks without a classifier") as err:
        npprune.export(
            tiny_vit().float(), tmp_path / "f.onnx", patterns(4, 1), features="cls", progress=False
        )
    assert "num_classes" in str(err.value.hint)


def test_probes_judge_each_image_by_the_others() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=g), torch.randint(0, 3, (40,), generator=g)
    x[y == 2, 0] += 2
    fit = probes.Ridge(x, y)
    found = fit.left_out(fit.best)
    amount = fit.best * float(fit.values.mean())  # of the whole set's ridge, for one left out
    for i in (0, 17):
        rest = torch.arange(40) != i
        a, b = x[rest].double(), torch.nn.functional.one_hot(y[rest], 3).double()
        centred = a - a.mean(0)
        w = torch.linalg.solve(centred.T @ centred + amount * torch.eye(5), centred.T @ b)
        torch.testing.assert_close(found[i], b.mean(0) + (x[i].double() - a.mean(0)) @ w)
    weight, bias = fit.layer()
    assert float(((x.double() @ weight.T + bias).argmax(1) == y).double().mean()) > 0.5
    doubled = torch.cat([x, x])  # the nearest other image is the same one
    assert torch.equal(probes.nearest_neighbours(doubled, torch.cat([y, y]), k=1)[:40], y)
