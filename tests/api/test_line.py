"""The stages in Python: on what is in memory, the same as on files, and nothing left behind."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import npprune
from npprune.criteria import CRITERIA, register
from npprune.data.digits import digit_image, split_positions
from npprune.data.transforms import make_transform
from npprune.errors import DataError, ModelError, NpPruneError, StoreError, UsageError
from npprune.models.info import weights_sha256
from npprune.pipeline.demo.training import PREPROCESSING
from npprune.pipeline.prune.stage import prune as stage
from npprune.recipe import DataSection, ModelSection, PruneSection
from npprune.store.checkpoints import read_checkpoint
from npprune.store.runs import RunFolder, read_plan
from tests.api.conftest import SMALL
from tests.helpers.digits_network import random_digits_network
from tests.helpers.tiny import tiny_vit

Data = tuple[Tensor, Tensor]
QUICK: dict[str, Any] = {"latency": False}


def same(a: nn.Module, b: nn.Module) -> bool:
    return weights_sha256(a) == weights_sha256(b)


def test_the_example_of_the_docstrings_runs_as_printed() -> None:
    for function in (npprune.discover, npprune.prune):
        text = inspect.getdoc(function) or ""
        code = text.partition("Example:")[2].partition("Args:")[0]
        assert "import timm, torch, npprune" in code
        # the same, on a network and images small enough for a test
        code = code.replace(
            '"vit_tiny_patch16_224"',
            '"vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_classes=10',
        )
        exec(inspect.cleandoc(code.replace("224, 224", "32, 32")), {})


def test_paths_are_those_of_discover_paths(model: nn.Module, data: Data) -> None:
    images, labels = data[0][:10], data[1][:10]
    expected = npprune.discover_paths(model, images, labels, topk=2)
    found = npprune.discover(model, (images, labels), topk=2)
    order = [int(name) for name in found.ids]
    assert sorted(order) == list(range(10))
    assert torch.equal(found.neurons, expected.neurons[order])
    assert torch.allclose(found.scores, expected.scores[order].double(), rtol=1e-4, atol=1e-6)
    assert torch.equal(found.labels, labels[order])
    assert set(found.class_paths) == set(labels.tolist())
    assert len(found) == 10


def test_pruning_in_memory_is_pruning_of_files(tmp_path: Path) -> None:
    """The same plan and the same weights, bit for bit, as by the stage that the command calls."""
    dense = random_digits_network(tmp_path / "dense")
    wish = {"keep": 0.5, "selection": "uniform", "calibration_images": 40}
    stage(
        ModelSection(name=str(dense)), DataSection(calibration="digits:calibration"),
        PruneSection(**wish), tmp_path / "small",
    )  # fmt: skip
    positions = split_positions("calibration")
    transform = make_transform(PREPROCESSING)
    images = torch.stack([transform(digit_image(i)) for i in positions])
    from sklearn.datasets import load_digits

    labels = torch.tensor([int(load_digits().target[i]) for i in positions])
    pruned = npprune.prune(npprune.load_model(dense), (images, labels), **wish)
    _, tensors = read_checkpoint(tmp_path / "small")
    plan = read_plan(tmp_path / "small")
    assert (pruned.plan.keep, pruned.plan.heads) == (plan.keep, plan.heads)
    found = pruned.model.state_dict()
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    by_name = npprune.prune(dense, "digits:calibration", **wish)
    assert same(by_name.model, pruned.model)
    assert by_name.predicted == pruned.predicted


def test_the_whole_line_in_memory_leaves_nothing_behind(
    model: nn.Module, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before, state = weights_sha256(model), torch.get_rng_state()
    loader = DataLoader(TensorDataset(*data), batch_size=16, shuffle=True)
    found = npprune.discover(model, loader, topk=2)
    assert "80 paths of 7 classes" in repr(found)
    pruned = npprune.prune(model, loader, target_macs=0.6, paths=found, **SMALL)
    cost = pruned.cost
    assert cost.dense_macs is not None
    assert cost.macs <= 0.6 * cost.dense_macs
    assert pruned.plan.how["paths"]
    assert not pruned.model.training
    assert {"drop", "dense_top1", "pruned_top1", "images"} <= set(pruned.predicted)
    evaluation = npprune.evaluate(pruned, loader, **QUICK)
    with torch.no_grad():
        right = (pruned.model(data[0]).argmax(1) == data[1]).sum()
        agree = (pruned.model(data[0]).argmax(1) == model.eval()(data[0]).argmax(1)).sum()
        model.train()
    assert (evaluation.pruned.top1.correct, evaluation.pruned.top1.total) == (int(right), 80)
    assert evaluation.agreement.correct == int(agree)
    healed = npprune.heal(pruned, loader, epochs=3, lr=1e-3)
    assert healed.after.divergence_nats < healed.before.divergence_nats
    assert pruned.healing is healed
    again = npprune.evaluate(pruned, loader, **QUICK)
    assert again.pruned.true_probability != evaluation.pruned.true_probability
    assert again.dense == evaluation.dense
    assert weights_sha256(model) == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    del found
    assert list(tmp_path.rglob("*")) == [tmp_path / "temporary"]
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_was_asked_for_is_one_of_the_commands(
    model: nn.Module, data: Data, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "half"
    found = npprune.discover(model, data, out=run)
    events: list[npprune.Event] = []
    npprune.discover(model, data, out=run, progress=events.append)
    assert "80 images found before: nothing to compute" in [e.message for e in events]
    with pytest.raises(StoreError, match="content"):  # the same labels, other images
        npprune.discover(model, (data[0] + 1, data[1]), out=run)
    pruned = npprune.prune(model, paths=found, keep=0.5, out=out, **SMALL)
    evaluation = npprune.evaluate(pruned, data, **QUICK)
    (variant,) = RunFolder(run).read_result().variants
    assert variant.evaluation is not None
    assert variant.evaluation.pruned == evaluation.pruned
    loaded = npprune.load(out)
    assert same(loaded.model, pruned.model)
    assert npprune.evaluate(loaded, data, dense=model, **QUICK).pruned == evaluation.pruned
    with pytest.raises(ModelError, match="was a network in the memory"):
        npprune.evaluate(loaded, data, **QUICK)
    npprune.save(model, tmp_path / "dense")
    found_again = npprune.evaluate(out, data, dense=tmp_path / "dense", **QUICK)
    assert found_again.pruned == evaluation.pruned
    npprune.heal(pruned, data, epochs=1, out=tmp_path / "healed")
    assert same(npprune.load(tmp_path / "healed").model, pruned.model)


def test_what_is_saved_is_loaded_again(pruned: npprune.Pruned, data: Data, tmp_path: Path) -> None:
    with torch.no_grad():
        for p in pruned.model.parameters():  # trained further, by its owner
            p.mul_(1.01)
    npprune.save(pruned, tmp_path / "x")
    again = npprune.load(tmp_path / "x")
    assert torch.equal(again.model(data[0]), pruned.model(data[0]))
    assert again.plan == pruned.plan
    assert again.predicted == pruned.predicted
    assert again.cost.macs == pruned.cost.macs
    assert torch.equal(npprune.load_model(tmp_path / "x")(data[0]), pruned.model(data[0]))


def test_export_is_compared_with_the_network_as_it_is_now(
    model: nn.Module, data: Data, tmp_path: Path
) -> None:
    import onnxruntime

    wish = {"criterion": "magnitude", "selection": "uniform", "compensation": "none"}
    pruned = npprune.prune(model, data, keep=0.5, **wish, **SMALL)
    with torch.no_grad():
        pruned.model.head.bias.add_(1.0)  # type: ignore[operator,union-attr]
    record = npprune.export(pruned, tmp_path / "m.onnx", data[0], **QUICK)  # no labels needed
    assert record.passed
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: data[0][:3].numpy()})
    assert torch.allclose(torch.from_numpy(found), pruned.model(data[0][:3]), atol=1e-4)


def test_images_without_labels_take_the_networks_own(model: nn.Module, data: Data) -> None:
    top = model.eval()(data[0][:6]).argmax(1)
    model.train()
    found = npprune.discover(model, data[0][:6])
    labels = {int(name): int(y) for name, y in zip(found.ids, found.labels, strict=True)}
    assert [labels[i] for i in range(6)] == top.tolist()
    assert "own predictions" in found.result.discovery.data.label_rule  # type: ignore[union-attr]


def test_classes_and_a_second_pruning(model: nn.Module, data: Data) -> None:
    pruned = npprune.prune(model, data, keep=0.5, classes=torch.tensor([1, 3]), **SMALL)
    assert pruned.model(data[0][:2]).shape == (2, 2)
    evaluation = npprune.evaluate(pruned, data, **QUICK)
    assert evaluation.restricted_to == [1, 3]
    again = npprune.prune(pruned, data[0], keep=0.5, **SMALL)
    assert sum(again.plan.kept_widths) < sum(pruned.plan.kept_widths)
    assert npprune.evaluate(again, (data[0], data[1] % 2), **QUICK).pruned.top1.total == 80


@pytest.mark.parametrize("change", ["channels", "head", "dropout", "size", "activation"])
def test_a_network_changed_by_hand(change: str, data: Data, tmp_path: Path) -> None:
    model: Any = tiny_vit().float()
    images, labels = data
    if change == "channels":
        model.patch_embed.proj = nn.Conv2d(4, 24, 4, 4)
        images = torch.cat([images, images[:, :1]], 1)
    elif change == "head":
        model.head, labels = nn.Linear(24, 3), labels % 3
    elif change == "dropout":
        model.head, labels = nn.Sequential(nn.Dropout(0.5), nn.Linear(24, 3)), labels % 3
    elif change == "size":
        model.set_input_size(img_size=(20, 12))
        images = nn.functional.interpolate(images, (20, 12))
    else:
        for block in model.blocks:
            block.mlp.act = nn.Mish()
    found = npprune.discover(model, (images[:8], labels[:8]))
    pruned = npprune.prune(model, (images, labels), keep=0.5, **SMALL)
    assert len(found) == 8
    assert pruned.model(images).shape == model(images).shape
    evaluation = npprune.evaluate(pruned, (images, labels), **QUICK)
    right = (pruned.model(images).argmax(1) == labels).sum()
    assert evaluation.pruned.top1.correct == int(right)
    if change in ("dropout", "activation"):  # no description of timm's builds these
        with pytest.raises(ModelError, match="a folder cannot hold this VisionTransformer"):
            npprune.save(pruned, tmp_path / "x")
        with pytest.raises(ModelError, match="a folder cannot hold"):
            npprune.prune(model, (images, labels), keep=0.5, out=tmp_path / "x")
    else:
        npprune.save(pruned, tmp_path / "x")
        assert torch.equal(npprune.load(tmp_path / "x").model(images), pruned.model(images))


class Adapter(nn.Module):
    """As peft's: beside the layer, not in it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.more = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.more(x)  # type: ignore[no-any-return]


class InATuple(VisionTransformer):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x),)


class InADict(VisionTransformer):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("adapter", r"block 1: `mlp.fc1` must be a linear layer of a weight and a bias alone"),
        ("parametrized", r"block 1: `mlp.fc2` must be .* parametrizations.weight.original0"),
        ("one block twice", "block 2 is block 1 once more"),
        ("tuple", r"must give a tensor of \[images, 7\], and of one image gives tuple"),
        ("dict", r"must give a tensor of \[images, 7\], and of one image gives dict"),
        ("NaN", r"`blocks.1.mlp.fc1.weight` of the network holds NaN or infinity"),
        ("two layers", "must end in a linear classifier, got Sequential"),
    ],
)
def test_a_network_changed_too_much_is_told_why(change: str, said: str, data: Data) -> None:
    model: Any = tiny_vit().float()
    block = model.blocks[1]
    if change == "adapter":
        block.mlp.fc1 = Adapter(block.mlp.fc1)
    elif change == "parametrized":
        nn.utils.parametrizations.weight_norm(block.mlp.fc2)
    elif change == "one block twice":
        model.blocks[2] = block
    elif change in ("tuple", "dict"):
        model.__class__ = InATuple if change == "tuple" else InADict
    elif change == "NaN":
        block.mlp.fc1.weight.data[0, 0] = torch.nan
    else:
        model.head = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 7))
    with pytest.raises(ModelError, match=said):
        npprune.prune(model, data, keep=0.5, progress=False, **SMALL)


def test_another_classifier_on_the_pruned_network(
    pruned: npprune.Pruned, data: Data, tmp_path: Path
) -> None:
    pruned.model.head = nn.Linear(24, 3)
    npprune.save(pruned, tmp_path / "x")
    again = npprune.load(tmp_path / "x")
    assert torch.equal(again.model(data[0]), pruned.model(data[0]))
    assert [c.index for c in again.config.classes] == [0, 1, 2]
    smaller = npprune.prune(pruned, data[0], keep=0.8, progress=False, **SMALL)
    assert npprune.evaluate(smaller, (data[0], data[1] % 3), **QUICK).pruned.top1.total == 80
    for call in (
        lambda: npprune.evaluate(pruned, data, **QUICK),
        lambda: npprune.heal(pruned, data, epochs=1),
    ):
        with pytest.raises(ModelError, match="has 3 outputs and the dense one 7"):
            call()


def test_attention_that_is_not_of_plain_layers_stays_as_it_is(data: Data) -> None:
    model: Any = tiny_vit().float()
    model.blocks[0].attn.qkv = Adapter(model.blocks[0].attn.qkv)
    nn.utils.parametrizations.weight_norm(model.blocks[1].attn.proj)
    pruned = npprune.prune(model, data, target_macs=0.8, progress=False, **SMALL)
    assert pruned.plan.heads is None
    assert npprune.evaluate(pruned, data, progress=False, **QUICK).agreement.value > 0.8
    assert npprune.discover_paths(model, data[0][:2], data[1][:2]).neurons.shape == (2, 3, 1)


def test_a_criterion_of_ones_own(model: nn.Module, data: Data) -> None:
    @npprune.criteria.register("last-units", "a test", "moments")
    def last(context: Any, l: int) -> Tensor:
        return torch.arange(len(context.moments(l).mean)).double()

    try:
        wish = {"criterion": "last-units", "selection": "uniform", **SMALL}
        pruned = npprune.prune(model, data, keep=0.5, **wish)
        assert pruned.plan.keep == [list(range(24, 48))] * 3
    finally:
        del CRITERIA["last-units"]
    assert register is npprune.criteria.register


def test_warnings_reach_the_caller_in_silence_and_events_a_function(
    model: nn.Module, data: Data
) -> None:
    wrong = (data[0], (model.eval()(data[0]).argmax(1) + 1) % 7)
    model.train()
    events: list[npprune.Event] = []
    pruned = npprune.prune(model, wrong, keep=0.5, progress=events.append, **SMALL)
    assert {"statistics", "prune"} <= {e.stage for e in events}
    assert [e.done for e in events if e.stage == "calibration"][-1] == 80
    assert pruned.warnings == pruned.plan.notes


def wrong_calls() -> list[Any]:
    images = torch.zeros(4, 3, 16, 16)
    labels = torch.tensor([0, 1, 2, 3])
    pair = (images, labels)
    return [
        ({"images": pair, "target_mac": 0.5}, "there is no setting `target_mac` here"),
        ({"images": pair, "keep": 1.5}, r"`keep` must be in \(0, 1\], got `1.5`"),
        ({"images": pair, "keep": 0.5, "target_macs": 0.5}, "`target_macs`"),
        (
            {"images": pair, "keep": 0.5, "checkpoint": "x"},
            "`checkpoint` is for a network given by",
        ),
        (
            {"images": pair, "keep": 0.5, "paths": 3},
            "`paths` must be what `npprune.discover` gives",
        ),
        ({"images": pair, "keep": 0.5, "use_paths": "x"}, "`paths` must be one of"),
        ({"images": pair, "keep": 0.5, "seed": -1}, "`seed` must be a whole number"),
        ({"keep": 0.5}, "`images` are needed"),
        ({"images": 7, "keep": 0.5}, "images must be a DataLoader, a data set, a tensor"),
        ({"images": iter([pair]), "keep": 0.5}, "images must be there more than once"),
        ({"images": (images, labels + 4), "keep": 0.5}, "label 7, and the network's outputs are"),
        ({"images": (images, labels[:2]), "keep": 0.5}, r"labels must be \[4\]"),
        ({"images": (images, labels + 0.5), "keep": 0.5}, "a label must be a whole number"),
        ({"images": (images / 0, labels), "keep": 0.5}, "image 0 holds NaN or infinity"),
        ({"images": images.byte(), "keep": 0.5}, "must hold floating-point numbers, got uint8"),
        ({"images": (images[..., :8], labels), "keep": 0.5}, r"do not fit .* takes \[3, 16, 16\]"),
        ({"images": images[0], "keep": 0.5}, "images must be .images, channels, height, width."),
        ({"images": [{"x": 1}], "keep": 0.5}, "must give images and labels"),
        ({"images": pair, "keep": 0.5, "model": nn.Linear(2, 2)}, "Linear has no `blocks`"),
        ({"images": pair, "keep": 0.5, "model": tiny_vit()}, "must be of float32, got float64"),
        ({"images": pair, "keep": 0.5, "model": 5}, "`model` must be a network, got int"),
        ({"images": pair, "keep": 0.5, "out": ".x"}, "`out` must name a folder"),
    ]


@pytest.mark.parametrize(("call", "message"), wrong_calls())
def test_wrong_calls_are_told_why(model: nn.Module, call: dict[str, Any], message: str) -> None:
    with pytest.raises(NpPruneError, match=message):
        npprune.prune(**{"model": model, **call})


def test_a_hint_stands_below_the_message(model: nn.Module, data: Data) -> None:
    with pytest.raises(UsageError) as caught:
        npprune.prune(model, data, target_mac=0.5)
    assert caught.value.__notes__ == ["hint: did you mean `target_macs`?"]


def test_other_stages_refuse_what_they_cannot_take(
    pruned: npprune.Pruned, model: nn.Module, data: Data, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="measured by their labels"):
        npprune.evaluate(pruned, data[0])
    with pytest.raises(UsageError, match=r"takes what `npprune\.prune` gives"):
        npprune.evaluate(model, data)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="one of `epochs` and `minutes`"):
        npprune.heal(pruned, data)
    with pytest.raises(UsageError, match="in memory, prepared"):
        npprune.heal(pruned, data, epochs=1, augment="strong")
    with pytest.raises(ModelError, match="other weights than those that were pruned"):
        npprune.evaluate(pruned, data, dense=tiny_vit(seed=1).float())
    with pytest.raises(DataError, match="were images in the memory"):
        npprune.export(pruned, tmp_path / "x.onnx")
    npprune.save(model, tmp_path / "dense")
    with pytest.raises(StoreError, match="was not pruned"):
        npprune.load(tmp_path / "dense")
