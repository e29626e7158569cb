"""Healing end to end on the digits: what it learns, keeps aside, resumes and refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from npprune.cli.app import run_app
from npprune.core import objective
from npprune.data.opening import open_source
from npprune.data.transforms import make_transform
from npprune.errors import DataError, GateError, ModelError, StoreError, UsageError
from npprune.models.info import state
from npprune.models.load import build
from npprune.pipeline.common.events import Event
from npprune.pipeline.common.results import render_report
from npprune.pipeline.common.work import Work
from npprune.pipeline.evaluate.stage import evaluate
from npprune.pipeline.heal import image_cache as pools
from npprune.pipeline.heal import stage as stage
from npprune.pipeline.heal.stage import heal, heal_pruned
from npprune.pipeline.prune.stage import prune
from npprune.pipeline.run import run_recipe
from npprune.recipe import (
    DataSection,
    EvaluateSection,
    ExportSection,
    HealSection,
    ModelSection,
    Recipe,
)
from npprune.records import Preprocessing, Variant
from npprune.store.checkpoints import read_checkpoint, read_config, write_checkpoint
from npprune.store.runs import RunFolder
from tests.helpers.digits_network import random_digits_network
from tests.helpers.discovering import FORK
from tests.helpers.processes import Team
from tests.pipeline.test_line import half

DATA = DataSection(train="digits:calibration")
WEIGHTS = "model.safetensors"


def dense_network(folder: Path) -> None:
    """The random network, its classes told apart: logits centred and spread over the digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random_digits_network(folder)
    config, tensors = read_checkpoint(folder)
    model = build(config, tensors)
    source = open_source("digits:calibration", num_classes=10)
    transform = make_transform(config.preprocessing)
    with torch.no_grad():
        logits = model(torch.stack([transform(source.load(i)) for i in range(0, 300, 3)]))
        scale = 3 / logits.std(dim=0)
        model.head.bias.copy_((model.head.bias - logits.mean(dim=0)) * scale)
        model.head.weight.mul_(scale[:, None])
    write_checkpoint(
        folder, replace(config, source=replace(config.source, sha256="")), state(model)
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense network, and a quarter of it whose second layers fit badly."""
    root = tmp_path_factory.mktemp("heal")
    dense_network(root / "dense")
    prune(
        ModelSection(name=str(root / "dense")),
        DataSection(calibration="digits:calibration", batch_size=64),
        half(keep=0.25, compensation="none"),
        root / "half",
    )
    return root


@pytest.fixture
def half_network(world: Path, tmp_path: Path) -> Path:
    """A copy of the two, to change at will: the pruned one's folder."""
    shutil.copytree(world / "dense", tmp_path / "dense")
    shutil.copytree(world / "half", tmp_path / "half")
    return tmp_path / "half"


@pytest.fixture(scope="module")
def straight(world: Path) -> Callable[[HealSection], bytes]:
    """The weights that a training without interruption comes to, each trained once."""
    known: dict[str, bytes] = {}

    def trained(settings: HealSection) -> bytes:
        key = settings.model_dump_json()
        if key not in known:
            root = world / f"straight{len(known)}"
            for name in ("dense", "half"):
                shutil.copytree(world / name, root / name)
            heal(root / "half", DATA, settings, root / "healed")
            known[key] = weights(root / "healed")
        return known[key]

    return trained


@dataclass
class Healed:
    """What one training left, to be read."""

    student: Path
    variant: Variant
    events: list[Event]


@pytest.fixture(scope="module")
def healed(world: Path) -> Healed:
    for name in ("dense", "half"):
        shutil.copytree(world / name, world / "read" / name)
    student = world / "read" / "half"
    events: list[Event] = []
    work = Work(command="npprune heal x", emit=events.append)
    variant = heal(student, DATA, short(), student.with_name("healed"), work=work)
    return Healed(student, variant, events)


def short(**more: object) -> HealSection:
    return HealSection(**{"epochs": 3, "lr": 2e-3, **more})


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


# ---------------------------------------------------------------- what it does


def test_the_healed_network_predicts_more_as_the_dense_one(half_network: Path) -> None:
    out = half_network.with_name("healed")
    variant = heal(half_network, DATA, short(epochs=6), out, work=Work(command="npprune heal ..."))
    found = variant.heal
    assert found is not None
    assert found.after.divergence_nats < 0.6 * found.before.divergence_nats
    assert (found.images, found.held_out, found.steps) == (270, 30, 96)
    assert found.augmentation == "mixed"
    assert found.images_per_second > 0
    assert not out.with_name("healed.partial").exists()
    test = DataSection(val="digits:test")
    before = evaluate(half_network, test, EvaluateSection(latency=False))
    after = evaluate(out, test, EvaluateSection(latency=False))  # it finds its dense network
    assert after.agreement.value > before.agreement.value
    config = read_config(out)
    assert config.details["healing"]["teacher_sha256"] == read_config(half_network).source.sha256
    assert config.plan_sha256 == read_config(half_network).plan_sha256


def test_the_report_has_the_curve_and_both_networks(healed: Healed) -> None:
    result = RunFolder(healed.student).read_result()
    assert [v.name for v in result.variants] == ["half", "healed"]
    assert result.variants[1].checkpoint == "../healed"
    assert result.variants[1].heal is not None
    assert result.commands == ["npprune heal x"]
    analysis = result.analyses["heal healed"]
    assert analysis.columns == ["held-out images", "dense", "pruned", "healed"]
    assert analysis.figure is not None
    assert len(analysis.figure.series[0].y) == len(result.variants[1].heal.curve) > 3
    html, markdown = render_report(healed.student)
    assert "Healing of healed" in html.read_text()
    assert "Healing of healed" in markdown.read_text()


def test_held_out_images_are_never_trained_on(
    half_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[pools.Chunk] = []
    epoch = pools.ImagesInMemory.epoch

    def spy(self: pools.ImagesInMemory, number: int, parts: list[torch.Tensor]) -> object:
        for chunk in epoch(self, number, parts):
            seen.append(chunk)
            yield chunk

    monkeypatch.setattr(pools.ImagesInMemory, "epoch", spy)
    heal(half_network, DATA, short(augment="none"), half_network.with_name("healed"))
    source = open_source("digits:calibration", num_classes=10)
    transform = make_transform(read_config(half_network).preprocessing)
    trained = {x.numpy().tobytes() for chunk in seen for x in chunk.images}
    images = [transform(source.load(i)) for i in range(300)]
    held_out = {images[i].numpy().tobytes() for i in range(9, 300, 10)}
    assert trained
    assert not trained & held_out
    assert trained <= {x.numpy().tobytes() for x in images}


def test_bytes_in_memory_give_the_transforms_bits() -> None:
    pre = Preprocessing((3, 24, 24), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop_pct=0.9)
    noise = torch.randint(0, 256, (40, 31, 3), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.to(torch.uint8).numpy())
    x = make_transform(pre)(image)[None]
    assert torch.equal(pools.from_bytes(pools.to_bytes(x, pre), pre), x)


def test_images_read_anew_in_every_epoch_give_the_same_weights(
    half_network: Path,
    straight: Callable[[HealSection], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = half_network.with_name("healed")
    settings = short(epochs=2)  # too short for a table of the teacher's predictions
    expected = straight(settings)
    read = pools.read

    def too_many(images: object, positions: list[int], what: str, **more: int) -> object:
        return None if what == "reading images" else read(images, positions, what, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("npprune.pipeline.heal.images.read", too_many)
    heal(half_network, DATA, settings, out)
    assert weights(out) == expected


@pytest.mark.parametrize(
    "more",
    [
        {"feature_weight": 0.5},
        {"feature_weight": 0.0, "augment": "flips"},
        pytest.param({"temperature": 3.0}, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16"}, marks=pytest.mark.slow),
        {"epochs": None, "minutes": 0.03},
        {"layerwise": True},
    ],
    ids=str,
)
def test_every_way_of_teaching_helps(half_network: Path, more: dict[str, object]) -> None:
    found = heal(half_network, DATA, short(**more), half_network.with_name("healed")).heal
    assert found is not None
    assert found.after.divergence_nats < found.before.divergence_nats
    assert found.method == ("layer-wise" if more.get("layerwise") else "distillation")


def test_labels_are_learnt_where_they_count(half_network: Path) -> None:
    settings = short(epochs=10, label_weight=20.0, patience=100, augment="none")
    found = heal(half_network, DATA, settings, half_network.with_name("healed")).heal
    assert found is not None
    assert found.curve[-1].top1 > found.curve[0].top1 + 0.2  # the dense one knows no digits


def test_long_runs_are_augmented_and_the_seed_decides(
    half_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stage.LONG_EPOCHS == 30
    monkeypatch.setattr(stage, "LONG_EPOCHS", 6)
    a, b, c = (half_network.with_name(n) for n in "abc")
    small = DATA.model_copy(update={"images_per_class": 2})
    settings = short(epochs=stage.LONG_EPOCHS, batch_size=4)
    random_state = torch.get_rng_state()
    found = heal(half_network, small, settings, a).heal
    assert found is not None
    assert found.augmentation == "strong"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert found.after.step > 0
    heal(half_network, small.model_copy(update={"workers": 2}), settings, b)
    heal(half_network, small, settings, c, work=Work(seed=1))
    assert weights(a) == weights(b) != weights(c)


def test_divergence_that_rises_ends_the_training(
    half_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = half_network.with_name("fitted")
    prune(
        ModelSection(name=str(half_network.with_name("dense"))),
        DataSection(calibration="digits:calibration", batch_size=64),
        half(keep=0.75),
        fitted,
    )
    settings = short(epochs=6, lr=0.1, patience=1)
    monkeypatch.setattr("npprune.pipeline.heal.distillation.MAY_RISE", 0.0)
    found = heal(fitted, DATA, settings, half_network.with_name("healed")).heal
    assert found is not None
    assert found.stopped == "held-out divergence that rose once"
    assert found.steps < 96
    one, two = (p.divergence_nats for p in found.curve[-2:])
    assert one < two


def test_a_high_rate_may_cost_something_at_first(half_network: Path) -> None:
    settings = short(epochs=8, lr=0.1, patience=1)
    found = heal(half_network, DATA, settings, half_network.with_name("healed")).heal
    assert found is not None
    assert found.steps >= 0.25 * 128


def test_nothing_better_leaves_the_weights_and_says_so(half_network: Path) -> None:
    out = half_network.with_name("healed")
    found = heal(half_network, DATA, short(lr=5.0, patience=1), out).heal
    assert found is not None
    assert found.after.step == 0
    assert any("did not lower" in warning for warning in found.warnings)
    _, before = read_checkpoint(half_network)
    _, after = read_checkpoint(out)
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_progress_tells_loss_agreement_and_the_end(healed: Healed) -> None:
    steps = [e for e in healed.events if e.level == "progress" and e.unit == "steps"]
    assert [e.done for e in steps] == list(range(1, 49))
    assert all(e.total == 48 for e in steps)
    assert "loss " in steps[-1].data["note"]
    assert "held-out agreement" in steps[-1].data["note"]
    assert any(
        "augmentation: every image as it is and mirrored" in e.message for e in healed.events
    )


def test_a_dry_run_writes_nothing(half_network: Path) -> None:
    out = half_network.with_name("healed")
    variant = heal(half_network, DATA, short(), out, dry_run=True)
    assert variant.heal is None
    assert sorted(p.name for p in out.parent.iterdir()) == ["dense", "half"]


def test_pruning_can_heal_at_once(half_network: Path) -> None:
    out, variant = heal_pruned(half_network, short())
    assert out.name == "half_healed"
    assert variant.heal is not None
    assert variant.heal.data.spec == "digits:calibration"


@pytest.mark.parametrize("as_json", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_command_line_prunes_and_heals(
    half_network: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    out = half_network.with_name("both")
    args = ["prune", str(half_network.with_name("dense")), "--keep", "0.5", "--criterion",
            "variance", "--selection", "uniform", "--calibration", "digits:calibration",
            "--heal", "2", "--out", str(out)]  # fmt: skip
    assert run_app(args + ["--json"] * as_json) == 0
    shown = capsys.readouterr().out
    if as_json:
        assert json.loads(shown)["heal"]["epochs"] == 2
    else:
        assert "pruned  healed" in " ".join(shown.split("\n")[-30:]).replace("   ", "  ")
    assert (out.with_name("both_healed") / WEIGHTS).is_file()


@pytest.mark.slow
def test_a_recipe_heals_and_exports_the_healed_network(half_network: Path) -> None:
    root = half_network.parent
    recipe = Recipe(
        name="r",
        model=ModelSection(name=str(root / "dense")),
        data=DataSection(train="digits:calibration", val="digits:test"),
        discover=None,
        prune=half(),
        heal=short(epochs=1),
        evaluate=EvaluateSection(latency=False),
        export=ExportSection(latency=False),
    )
    result = run_recipe(recipe, root=root)
    pruned, healed = result.variants
    assert (pruned.name, healed.name) == ("r", "r_healed")
    assert pruned.evaluation is not None
    assert healed.evaluation is not None
    assert healed.export is not None
    assert pruned.export is None


# ---------------------------------------------------------------- interruptions


def interrupted_at(step: int, unit: str = "steps") -> Callable[[Event], None]:
    def emit(event: Event) -> None:
        if event.level == "progress" and event.unit == unit and event.done == step:
            raise KeyboardInterrupt

    return emit


@pytest.mark.parametrize(
    ("step", "more"),
    [
        (17, {}),
        (9, {"feature_weight": 0.2}),
        pytest.param(5, {}, marks=pytest.mark.slow),
        pytest.param(11, {"epochs": 2}, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_training_goes_on_with_the_same_bits(
    half_network: Path,
    straight: Callable[[HealSection], bytes],
    step: int,
    more: dict[str, object],
) -> None:
    out, settings = half_network.with_name("healed"), short(**more)
    with pytest.raises(KeyboardInterrupt):
        heal(half_network, DATA, settings, out, work=Work(emit=interrupted_at(step)))
    assert not out.exists()
    events: list[Event] = []
    found = heal(half_network, DATA, settings, out, work=Work(emit=events.append)).heal
    assert weights(out) == straight(settings)
    assert any("resumes at step" in e.message for e in events)
    assert found is not None
    assert [p.step for p in found.curve] == sorted({p.step for p in found.curve})


def test_layers_go_on_with_the_same_bits(
    half_network: Path, straight: Callable[[HealSection], bytes]
) -> None:
    out, settings = half_network.with_name("healed"), short(layerwise=True)
    with pytest.raises(KeyboardInterrupt):
        heal(half_network, DATA, settings, out, work=Work(emit=interrupted_at(1, "blocks")))
    heal(half_network, DATA, settings, out)
    assert weights(out) == straight(settings)


def heal_and_die(student: Path, out: Path, threads: int) -> None:
    """In a process of its own: healing that is killed after 13 steps."""

    def emit(event: Event) -> None:
        if event.level == "progress" and event.unit == "steps" and event.done == 13:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(threads)
    heal(student, DATA, short(), out, work=Work(emit=emit))


@pytest.mark.slow
def test_a_killed_process_goes_on_with_the_same_bits(
    half_network: Path, straight: Callable[[HealSection], bytes]
) -> None:
    out = half_network.with_name("healed")
    process = FORK.Process(target=heal_and_die, args=(half_network, out, torch.get_num_threads()))
    process.start()
    process.join(120)
    assert process.exitcode == -9
    assert out.with_name("healed.partial").is_dir()
    heal(half_network, DATA, short(), out)
    assert weights(out) == straight(short())


def test_an_interrupted_training_of_other_settings_is_refused(half_network: Path) -> None:
    out = half_network.with_name("healed")
    with pytest.raises(KeyboardInterrupt):
        heal(half_network, DATA, short(), out, work=Work(emit=interrupted_at(5)))
    with pytest.raises(StoreError, match=r"other settings: `lr`: 0.002 -> 0.001"):
        heal(half_network, DATA, short(lr=1e-3), out)


def test_a_changed_state_is_set_aside_and_trained_again(
    half_network: Path, straight: Callable[[HealSection], bytes]
) -> None:
    out = half_network.with_name("healed")
    with pytest.raises(KeyboardInterrupt):
        heal(half_network, DATA, short(), out, work=Work(emit=interrupted_at(5)))
    (file,) = out.with_name("healed.partial").glob("state-*.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    events: list[Event] = []
    heal(half_network, DATA, short(), out, work=Work(emit=events.append))
    assert any("the training begins anew" in e.message for e in events if e.level == "warning")
    assert weights(out) == straight(short())
    assert not out.with_name("healed.partial").exists()


# ---------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_come_to_what_one_comes_to(half_network: Path) -> None:
    one, two = half_network.with_name("one"), half_network.with_name("two")
    heal(half_network, DATA, short(), one)
    command = [
        "heal", str(half_network), "--data", "digits:calibration", "--epochs", "3",
        "--lr", "2e-3", "--device", "cpu", "--out", str(two), "--json",
    ]  # fmt: skip
    team = Team(two.parent, command)
    assert team.end() == [0, 0], team.text("err0") + team.text("err1")
    assert team.text("out0").count('"processes": 2') == 1
    assert team.text("out1") == ""
    (_, a), (_, b) = read_checkpoint(one), read_checkpoint(two)
    start = read_checkpoint(half_network)[1]
    moved = sum(float((a[k] - start[k]).square().sum()) for k in a) ** 0.5
    apart = sum(float((a[k] - b[k]).square().sum()) for k in a) ** 0.5
    assert apart < 0.01 * moved


def test_a_batch_that_cannot_be_shared_is_refused(
    half_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from npprune.pipeline.common import work
    from npprune.pipeline.common.processes import Processes

    monkeypatch.setattr(work, "processes", lambda: Processes(0, 3, 0, 3))
    with pytest.raises(UsageError, match=r"a multiple of the 3 processes.*got 16"):
        heal(half_network, DATA, short(), half_network.with_name("healed"))


# ---------------------------------------------------------------- classes


def pruned_for(root: Path, *, keep_head: bool) -> Path:
    out = root / "some"
    prune(
        ModelSection(name=str(root / "dense")),
        DataSection(calibration="digits:calibration", classes=[2, 3, 7]),
        half(keep=0.25, compensation="none", keep_head=keep_head),
        out,
    )
    return out


@pytest.mark.parametrize("keep_head", [pytest.param(True, marks=pytest.mark.slow), False])
def test_specialised_networks_heal_on_their_classes(half_network: Path, keep_head: bool) -> None:
    some = pruned_for(half_network.parent, keep_head=keep_head)
    out = some.with_name("healed")
    events: list[Event] = []
    found = heal(
        some, DATA, short(epochs=20, label_weight=0.01), out, work=Work(emit=events.append)
    ).heal
    assert found is not None
    assert found.data.classes == 3
    assert any("limited to the student's 3 classes" in e.message for e in events)
    assert found.after.divergence_nats < 0.8 * found.before.divergence_nats
    config, tensors = read_checkpoint(out)
    with torch.no_grad():
        logits = build(config, tensors)(torch.randn(50, 3, 8, 8))
    assert logits.shape[1] == (10 if keep_head else 3)
    with pytest.raises(DataError, match=r"class `?5`? is not one of"):
        heal(some, DATA.model_copy(update={"classes": [2, 5]}), short(), out.with_name("x"))


# ---------------------------------------------------------------- images


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    Image.fromarray(torch.randint(0, 256, (8, 8, 3), generator=g).to(torch.uint8).numpy()).save(
        path
    )


def test_a_flat_folder_without_labels_will_do(half_network: Path) -> None:
    root = half_network.with_name("flat")
    for i in range(40):
        picture(root / f"{i:02d}.png", i)
    out = half_network.with_name("healed")
    data = DataSection(train=f"folder:{root}")
    found = heal(half_network, data, short(batch_size=8), out).heal
    assert found is not None
    assert (found.images, found.held_out, found.dense_top1) == (36, 4, None)
    assert found.before.top1 is None
    assert found.after.divergence_nats < found.before.divergence_nats
    with pytest.raises(DataError, match="without labels"):
        heal(half_network, data, short(label_weight=1.0), out.with_name("x"))


def test_unlabelled_images_are_trained_on_and_never_held_out(half_network: Path) -> None:
    more = half_network.with_name("more")
    for i in range(30):
        picture(more / "any" / f"{i}.png", i)
    (more / "any" / "x.heic").write_bytes(b"")
    settings = short(unlabelled=f"folder:{more}", label_weight=0.1)
    events: list[Event] = []
    out = half_network.with_name("healed")
    found = heal(half_network, DATA, settings, out, work=Work(emit=events.append)).heal
    assert found is not None
    assert any(e.level == "warning" and "1 .heic" in e.message for e in events)
    assert (found.images, found.held_out) == (300, 30)
    assert found.unlabelled is not None
    assert found.unlabelled.images == 30
    assert found.data.images == 300


def test_unreadable_images_are_skipped_and_counted(half_network: Path) -> None:
    root = half_network.with_name("photos")
    for i in range(30):
        picture(root / str(i % 10) / f"{i}.png", i)
    (root / "3" / "3.png").write_bytes(b"no picture")
    out = half_network.with_name("healed")
    events: list[Event] = []
    data = DataSection(train=f"folder:{root}")
    found = heal(half_network, data, short(batch_size=8), out, work=Work(emit=events.append)).heal
    assert found is not None
    assert len(found.data.skipped) == 1
    assert found.data.images == 29
    assert any(e.level == "warning" and "3.png" in e.message for e in events)
    again = heal(half_network, data, short(batch_size=8, augment="strong"), out).heal
    assert again is not None
    assert len(again.data.skipped) == 1


def test_one_image_is_refused(half_network: Path) -> None:
    root = half_network.with_name("one")
    picture(root / "0" / "a.png", 0)
    with pytest.raises(DataError, match="has one image: healing trains on some"):
        heal(half_network, DataSection(train=f"folder:{root}"), short(), root.with_name("x"))


def test_two_images_are_enough(half_network: Path) -> None:
    root = half_network.with_name("two")
    for name in "ab":
        picture(root / name / "x.png", ord(name))
    found = heal(
        half_network, DataSection(train=f"folder:{root}"), short(), root.with_name("x")
    ).heal
    assert found is not None
    assert (found.images, found.held_out, found.steps) == (1, 1, 3)


# ---------------------------------------------------------------- refusals


def test_another_teacher_is_refused_unless_asked_for(half_network: Path) -> None:
    other = half_network.with_name("other")
    config, tensors = read_checkpoint(half_network.with_name("dense"))
    tensors["head.bias"] = tensors["head.bias"] + 0.1
    model = build(config, tensors)
    source = replace(config.source, sha256="")
    write_checkpoint(other, replace(config, source=source), state(model))
    out = half_network.with_name("healed")
    with pytest.raises(ModelError, match="was pruned from weights"):
        heal(half_network, DATA, short(), out, dense_checkpoint=str(other))
    found = heal(half_network, DATA, short(), out, dense_checkpoint=str(other), any_teacher=True)
    assert found.heal is not None
    assert found.heal.teacher_sha256 != read_config(out).source.sha256
    evaluate(out, DataSection(val="digits:test"), EvaluateSection(latency=False))


def test_a_file_is_never_ignored_for_the_folder_that_was_pruned(half_network: Path) -> None:
    out, alone = half_network.with_name("healed"), half_network.with_name("alone.safetensors")
    dense = half_network.with_name("dense")
    shutil.copy(dense / WEIGHTS, alone)
    with pytest.raises(ModelError, match="is a checkpoint folder, and `--dense` names a file"):
        heal(half_network, DATA, short(), out, dense_checkpoint=str(alone), dry_run=True)
    with pytest.raises(ModelError, match="was pruned from weights"):  # its own are no teacher
        heal(
            half_network, DATA, short(), out,
            dense_checkpoint=str(half_network / WEIGHTS), dry_run=True,
        )  # fmt: skip
    heal(half_network, DATA, short(), out, dense_checkpoint=str(dense / WEIGHTS), dry_run=True)


def test_a_dense_network_has_nothing_to_heal(half_network: Path) -> None:
    with pytest.raises(ModelError, match="was not pruned"):
        heal(half_network.with_name("dense"), DATA, short(), half_network.with_name("x"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": None}, "got none"),
        ({"minutes": 1.0}, "got both"),
        ({"epochs": None, "minutes": 1.0, "layerwise": True}, "needs `epochs`"),
        ({"layerwise": True, "feature_weight": 1.0}, "`feature_weight` is for training"),
        ({"layerwise": True, "augment": "strong"}, "takes images as they are"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(
    half_network: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        heal(half_network, DATA, short(**settings), half_network.with_name("x"))


def test_the_folder_of_the_result_is_checked_first(half_network: Path) -> None:
    with pytest.raises(UsageError, match="must not overwrite an input"):
        heal(half_network, DATA, short(), half_network)
    full = half_network.with_name("full")
    picture(full / "a.png", 0)
    with pytest.raises(StoreError, match="is not replaced: it is not empty"):
        heal(half_network, DATA, short(), full)


def test_a_loss_that_is_no_number_ends_with_a_reason(
    half_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = objective.divergence_at
    calls = []

    def broken(*args: object) -> torch.Tensor:
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) > 4 else 1)  # type: ignore[arg-type]

    monkeypatch.setattr(objective, "divergence_at", broken)
    out = half_network.with_name("healed")
    with pytest.raises(GateError, match="the loss became nan at step 4 of 48") as err:
        heal(half_network, DATA, short(), out)
    assert err.value.hint is not None
    assert "a smaller `lr` than 0.002" in err.value.hint
    assert not out.exists()
    assert not out.with_name("healed.partial").exists()


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_network_without_numbers_is_named_before_the_first_step(
    half_network: Path, monkeypatch: pytest.MonkeyPatch, layerwise: bool
) -> None:
    monkeypatch.setattr(objective, "divergence_at", lambda a, *more: a.sum(1) * float("nan"))
    with pytest.raises(ModelError, match=r"the pruned network gives NaN .* before the first step"):
        heal(half_network, DATA, short(layerwise=layerwise), half_network.with_name("healed"))


def test_the_summary_survives_its_file(healed: Healed) -> None:
    stored = RunFolder(healed.student).read_result().variant("healed")
    assert stored is not None
    assert stored.heal == healed.variant.heal
