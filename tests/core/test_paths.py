"""Joint attribution against a derivation of its own: loops over images, points and neurons."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npprune.core.attribution import methods
from npprune.core.attribution import search as paths
from npprune.core.attribution.methods import METHODS
from npprune.core.attribution.quadrature import END_AT_ONE, Integral, Rule, RuleOrAuto, quadrature
from npprune.core.view import Scope, VitView
from npprune.errors import UsageError
from npprune.models.blocks import blocks_of
from npprune.models.view import make_view
from tests.helpers.tiny import tiny_batch, tiny_swin, tiny_vit

MODELS = {
    "cls": lambda: tiny_vit(),
    "patch": lambda: tiny_vit(global_pool="avg", fc_norm=True),
    "cls+registers": lambda: tiny_vit(reg_tokens=2),
    "cls+layerscale+qknorm": lambda: tiny_vit(init_values=0.5, qk_norm=True),
}


def joint_attribution(
    view: VitView, images: Tensor, labels: Tensor, topk: int = 1, neurons: Any = None,
    scope: str = "cls", **words: Any,
) -> paths.PathBatch:  # fmt: skip
    integral = Integral.of(view.scope, scope, **words)
    return paths.joint_attribution(view, images, labels, integral, topk=topk, neurons=neurons)


def own_attribution(view: VitView, images: Tensor, labels: Tensor, **words: Any) -> list[Tensor]:
    return paths.own_attribution(view, images, labels, Integral.of(view.scope, **words))


def find_paths(
    view: VitView, images: Tensor, labels: Tensor, topk: int = 1, method: Any = "neuron-path",
    generator: torch.Generator | None = None, **words: Any,
) -> paths.PathBatch:  # fmt: skip
    integral = Integral.of(view.scope, **words)
    return methods.find_paths(
        view, images, labels, topk=topk, method=method, integral=integral, generator=generator
    )


def test_the_default_points_of_an_integral() -> None:
    """Written out once more: what the words come to."""

    def points(rule: str, *args: Any) -> list[tuple[str, int, int, int]]:
        made = [Integral.of("cls", scope, rule, *args) for scope in ("auto", "patch")]
        return [(i.rule, i.points, i.first_points, i.image_points) for i in made]

    assert points("auto") == [("gauss-radau", 4, 4, 20), ("mapped-radau", 6, 12, 20)]
    assert points("gauss-radau")[1] == ("gauss-radau", 7, 12, 20)
    assert points("mapped-radau")[0] == ("mapped-radau", 5, 5, 20)
    assert points("gauss-legendre") == [("gauss-legendre", n, n, 20) for n in (5, 8)]
    assert points("left-riemann") == [("left-riemann", 20, 20, 20)] * 2
    assert points("auto", 3) == [("gauss-radau", 3, 3, 3), ("mapped-radau", 3, 3, 3)]
    patch = Integral.of("patch")
    assert patch.points_by("neuron-path") == patch.points_by("knowledge-neuron") == (6, 12)
    assert patch.points_by("activation") == patch.points_by("random") == (6, 6)
    assert patch.points_by("influence-pattern") == (20, 20)


def positions(model: nn.Module, scope: str) -> slice:
    prefix = getattr(model, "num_prefix_tokens", 0)
    return {"cls": slice(0, 1), "patch": slice(prefix, None), "all": slice(None)}[scope]


def at_places_of(tokens: int, values: Tensor) -> Tensor:
    """Values of tokens [s] at so many tokens of a later block, of square grids: each token belongs
    to the place where it merged, and its value is added there."""
    side, wanted = math.isqrt(len(values)), math.isqrt(tokens)
    if side == wanted or side * side != len(values):
        return values
    out = values.new_zeros(tokens)
    for n, value in enumerate(values):
        row, column = divmod(n, side)
        out[(row * wanted // side) * wanted + column * wanted // side] += value
    return out


def run(model: nn.Module, image: Tensor, hidden: dict[int, Tensor], where: slice) -> Tensor:
    """Probabilities [c] of one image, the hidden activations of some blocks put in by hooks."""
    handles = []
    for l, value in hidden.items():

        def put(module: nn.Module, args: tuple[Tensor], value: Tensor = value) -> tuple[Tensor]:
            h = args[0].clone()
            h[:, where] = value
            return (h,)

        handles.append(blocks_of(model)[l].mlp.fc2.register_forward_pre_hook(put))
    try:
        return model(image[None]).softmax(-1)[0]
    finally:
        for handle in handles:
            handle.remove()


def clean(model: nn.Module, image: Tensor, where: slice) -> list[Tensor]:
    seen: list[Tensor] = []
    handles = [
        b.mlp.fc2.register_forward_pre_hook(lambda m, a: seen.append(a[0][0, where].detach()))
        for b in blocks_of(model)
    ]
    model(image[None])
    for handle in handles:
        handle.remove()
    return seen


def naive(
    model: nn.Module, image: Tensor, label: int, scope: str, topk: int, rule: str, points: int,
    accumulation: str,
) -> tuple[list[list[int]], float]:  # fmt: skip
    """The released program's cost and the formula's words: every block a forward from the pixels,
    every path neuron a gradient of its own."""
    where = positions(model, scope)
    w = clean(model, image, where)
    nodes, weights = quadrature(rule, points)
    path: list[list[int]] = []
    counted: list[tuple[int, int]] = []

    def gradients(l: int, scale_all: bool) -> tuple[list[Tensor], Tensor]:
        """Integrated gradients at the tokens: of each counted neuron [s], of block l [s, h]."""
        own = torch.zeros_like(w[l])
        of_path = [torch.zeros(len(w[j]), dtype=own.dtype) for j, _ in counted]
        for alpha, weight in zip(nodes, weights, strict=True):
            put = {}
            for j, neurons in enumerate(path):
                value = w[j].clone()
                value[:, neurons] *= alpha
                put[j] = value.requires_grad_()
            if scale_all:
                put[l] = (alpha * w[l]).requires_grad_()
            p = run(model, image, put, where)[label]
            grads = dict(zip(put, torch.autograd.grad(p, list(put.values())), strict=True))
            if scale_all:
                own += weight * grads[l]
            for n, (j, i) in enumerate(counted):
                of_path[n] += weight * grads[j][:, i]
        return of_path, own

    def summed(l: int, values: Any) -> Tensor:
        """Values of the counted neurons' tokens, each at the place of a token of block l."""
        return sum((at_places_of(len(w[l]), v) for v in values), torch.zeros_like(w[l][:, 0]))

    for l in range(len(w)):
        of_path, own = gradients(l, scale_all=True)
        scores = []
        for i in range(own.shape[1]):
            g = summed(l, of_path) + own[:, i]
            a = summed(l, (w[j][:, n] for j, n in counted)) + w[l][:, i]
            scores.append(float((g * a).sum()))
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:topk]
        path.append(best)
        counted += [(l, i) for i in (best if accumulation == "sum" else best[-1:])]
    of_path, _ = gradients(len(w) - 1, scale_all=False)
    total = summed(len(w) - 1, (w[j][:, n] for j, n in counted))
    return path, float((summed(len(w) - 1, of_path) * total).sum())


@pytest.mark.parametrize(("rule", "accumulation"), [
    ("gauss-legendre", "sum"), ("gauss-legendre", "last"), ("gauss-radau", "sum"),
    ("mapped-radau", "sum"),
])  # fmt: skip
@pytest.mark.parametrize(("kind", "scope"), [
    ("cls", "cls"), ("patch", "patch"), ("cls+registers", "cls"), ("cls", "all"),
    pytest.param("cls+layerscale+qknorm", "cls", marks=pytest.mark.slow),
    pytest.param("cls+registers", "patch", marks=pytest.mark.slow),
])  # fmt: skip
def test_agrees_with_loops_over_neurons_points_and_images(
    kind: str, scope: str, rule: str, accumulation: str
) -> None:
    model = MODELS[kind]()
    images, labels = tiny_batch(3)
    found = joint_attribution(
        make_view(model), images, labels, topk=2, scope=scope, rule=rule, points=3,
        accumulation=accumulation,
    )  # fmt: skip
    for n in range(len(images)):
        path, score = naive(model, images[n], int(labels[n]), scope, 2, rule, 3, accumulation)
        assert found.neurons[n].tolist() == path
        assert float(found.scores[n]) == pytest.approx(score, rel=1e-9)


@pytest.mark.parametrize(("name", "depths"), [
    ("swin_tiny_patch4_window7_224", (2, 1)), ("swinv2_tiny_window8_256", (1, 1, 1)),
])  # fmt: skip
def test_where_patches_merge_the_sums_are_of_places(name: str, depths: tuple[int, ...]) -> None:
    model = tiny_swin(
        name=name, img_size=16, window_size=2, depths=depths, num_heads=(2,) * len(depths)
    )
    images, labels = tiny_batch(2)
    found = joint_attribution(
        make_view(model), images, labels, topk=2, scope="patch", rule="gauss-radau", points=2
    )
    for n in range(len(images)):
        path, score = naive(model, images[n], int(labels[n]), "patch", 2, "gauss-radau", 2, "sum")
        assert found.neurons[n].tolist() == path
        assert float(found.scores[n]) == pytest.approx(score, rel=1e-9)


@pytest.mark.parametrize("rule", END_AT_ONE)
def test_one_point_of_gauss_radau_is_the_clean_run(rule: Rule) -> None:
    """There the integral is the gradient itself, and no block is run again."""
    view = make_view(tiny_vit())
    images, labels = tiny_batch(3)
    found = joint_attribution(view, images, labels, scope="cls", rule=rule, points=1)
    for n in range(len(images)):
        path, score = naive(view.model, images[n], int(labels[n]), "cls", 1, rule, 1, "sum")
        assert found.neurons[n].tolist() == path
        assert float(found.scores[n]) == pytest.approx(score, rel=1e-9)


@pytest.mark.parametrize("points", [1, 2, 5, 8, 33])
def test_gauss_radau_is_exact_for_polynomials_and_ends_at_one(points: int) -> None:
    nodes, weights = quadrature("gauss-radau", points)
    assert nodes[-1] == 1
    assert ((nodes[:-1] > 0) & (nodes[:-1] < 1)).all()
    for degree in range(2 * points - 1):
        assert float((weights * nodes**degree).sum()) == pytest.approx(1 / (degree + 1), rel=1e-12)
    if points < 6:  # afterwards the error is below the rounding
        beyond = float((weights * nodes ** (2 * points - 1)).sum())
        assert beyond != pytest.approx(1 / (2 * points), rel=1e-7)


@pytest.mark.parametrize("points", [1, 2, 5, 8, 33])
def test_the_mapped_rule_adds_up_to_one_and_ends_there(points: int) -> None:
    nodes, weights = quadrature("mapped-radau", points)
    assert nodes[-1] == 1
    assert nodes[0] > 0
    assert (nodes.diff() > 0).all()
    assert float(weights.sum()) == pytest.approx(1, rel=1e-14)


def test_the_mapped_rule_is_better_where_the_integrand_is_steep_near_zero() -> None:
    """alpha / (alpha + 0.04), as steep as p at the patches: its integral is known."""
    exact = 1 - 0.04 * math.log(1.04 / 0.04)

    def error(rule: Rule, points: int) -> float:
        nodes, weights = quadrature(rule, points)
        return abs(float((weights * nodes / (nodes + 0.04)).sum()) - exact)

    for points in (4, 6, 8):
        assert error("mapped-radau", points) < 0.5 * error("gauss-radau", points)
        assert error("mapped-radau", points + 8) < 0.1 * error("mapped-radau", points)


def test_as_many_points_as_the_scope_needs() -> None:
    view = make_view(tiny_vit())
    images, labels = tiny_batch(2)
    neurons = joint_attribution(view, images, labels, scope="patch").neurons
    for scope, points, path in (("cls", 4, None), ("patch", 6, neurons)):
        found = joint_attribution(view, images, labels, scope=scope, neurons=path)
        same = joint_attribution(view, images, labels, scope=scope, points=points, neurons=path)
        assert torch.equal(found.scores, same.scores)


@pytest.mark.parametrize("scope", ["patch", "all"])
def test_the_first_block_is_chosen_by_twelve_points(
    scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself, the search scores block 0 by 12 points; with `points`, by those."""
    scored: list[Tensor] = []
    gradient = paths._Walk.own_gradient

    def seen(self: Any, l: int, w: Tensor) -> Tensor:
        scored.append((w * gradient(self, l, w)).sum(1))
        return gradient(self, l, w)

    monkeypatch.setattr(paths._Walk, "own_gradient", seen)
    view = make_view(tiny_vit())
    images, labels = tiny_batch(3)
    for given, used in ((None, 12), (6, 6)):
        joint_attribution(view, images, labels, scope=scope, points=given)
        expected = own_attribution(view, images, labels, scope=scope, points=used)[0]
        torch.testing.assert_close(scored[0], expected, rtol=1e-12, atol=1e-15)
        scored.clear()


def test_the_tangent_and_the_graph_are_two_ways_to_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view = make_view(tiny_vit())
    images, labels = tiny_batch(5)
    forward = joint_attribution(view, images, labels, topk=3, scope="cls")
    monkeypatch.setattr(paths, "_TangentWalk", paths._GraphWalk)
    backward = joint_attribution(view, images, labels, topk=3, scope="cls")
    assert torch.equal(forward.neurons, backward.neurons)
    torch.testing.assert_close(forward.scores, backward.scores, rtol=1e-11, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["cls", "patch"])
def test_a_path_has_the_score_that_its_method_reports(kind: str, method: str) -> None:
    view = make_view(MODELS[kind]())
    images, labels = tiny_batch(3)
    found = find_paths(view, images, labels, topk=2, method=method)
    again = joint_attribution(view, images, labels, topk=2, scope=view.scope, neurons=found.neurons)
    torch.testing.assert_close(found.scores, again.scores, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("scope", ["cls", "all"])
def test_how_many_rows_go_together_changes_nothing(
    scope: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_vit()
    images, labels = tiny_batch()
    together = joint_attribution(make_view(model), images, labels, scope=scope, topk=2)
    monkeypatch.setattr(paths, "PIECE", 1)
    one_by_one = joint_attribution(make_view(model), images, labels, scope=scope, topk=2)
    assert torch.equal(one_by_one.neurons, together.neurons)
    torch.testing.assert_close(one_by_one.scores, together.scores, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["neuron-path", "activation", "knowledge-neuron"])
@pytest.mark.parametrize("kind", ["cls", "patch"])
def test_images_do_not_see_each_other(kind: str, method: str) -> None:
    """Another order, other company or smaller batches change nothing but the order."""
    view = make_view(MODELS[kind]())
    images, labels = tiny_batch(6)
    together = find_paths(view, images, labels, topk=2, method=method)
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    permuted = find_paths(view, images[order], labels[order], topk=2, method=method)
    assert torch.equal(permuted.neurons, together.neurons[order])
    torch.testing.assert_close(permuted.scores, together.scores[order], rtol=1e-10, atol=1e-15)
    for n in range(len(images)):
        alone = find_paths(view, images[n : n + 1], labels[n : n + 1], topk=2, method=method)
        assert torch.equal(alone.neurons[0], together.neurons[n])
        torch.testing.assert_close(alone.scores[0], together.scores[n], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("scope", ["cls", "all"])
def test_completeness_of_the_units_own_parts(scope: str) -> None:
    """Sum over a block of w_i x integrated g_i = p at the clean run - p with the block at 0."""
    model = tiny_vit()
    images, labels = tiny_batch(3)
    own = own_attribution(make_view(model), images, labels, scope=scope, points=160)
    where = positions(model, scope)
    for n in range(len(images)):
        p = run(model, images[n], {}, where)[labels[n]].detach()
        w = clean(model, images[n], where)
        for l in range(len(w)):
            zero = run(model, images[n], {l: torch.zeros_like(w[l])}, where)[labels[n]].detach()
            assert float(own[l][n].sum()) == pytest.approx(float(p - zero), rel=1e-7, abs=1e-12)


def test_own_parts_are_captums_integrated_gradients() -> None:
    """captum's integrated gradients with the hidden layer as the input, from zero."""
    captum = pytest.importorskip("captum.attr")
    model = tiny_vit()
    images, labels = tiny_batch(3)
    own = own_attribution(
        make_view(model), images, labels, scope="all", rule="gauss-legendre", points=8
    )
    for l, block in enumerate(model.blocks):
        hidden = torch.stack([clean(model, image, slice(None))[l] for image in images])

        def probability(h: Tensor, x: Tensor, fc2: nn.Module = block.mlp.fc2) -> Tensor:
            handle = fc2.register_forward_pre_hook(lambda m, a: (h,))
            try:
                return model(x).softmax(-1)
            finally:
                handle.remove()

        expected = captum.IntegratedGradients(probability).attribute(
            hidden, baselines=torch.zeros_like(hidden), target=labels, n_steps=8,
            method="gausslegendre", additional_forward_args=(images,), internal_batch_size=3,
        )  # fmt: skip
        torch.testing.assert_close(own[l], expected.sum(1), rtol=1e-5, atol=1e-9)


def test_more_points_converge() -> None:
    view = make_view(tiny_vit())
    images, labels = tiny_batch(4)
    exact = joint_attribution(view, images, labels, points=48)

    def error(rule: RuleOrAuto, points: int | None = None) -> float:
        found = joint_attribution(
            view, images, labels, neurons=exact.neurons, rule=rule, points=points
        )
        return float((found.scores - exact.scores).abs().max())

    released = error("left-riemann")
    assert error("gauss-legendre") < 0.05 * released
    four, five = error("auto"), error("gauss-radau", 5)
    assert four < 0.25 * released  # the default, for the class token
    assert five < 0.05 * released
    for rule in END_AT_ONE:
        assert error(rule, 6) < 0.25 * error(rule, 4) < 0.05 * error(rule, 2)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_vit().train()
    images, labels = tiny_batch(2)
    joint_attribution(make_view(model), images, labels)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize(("wrong", "message"), [
    ({"topk": 0}, "`topk` must be in 1..48"),
    ({"topk": 49}, "`topk` must be in 1..48"),
    ({"method": "magic"}, "`method` must be one of"),
    ({"rule": "simpson"}, "`quadrature` must be one of"),
    ({"points": 0}, "`points` must be at least 1"),
    ({"scope": "class"}, "`scope` must be one of"),
    ({"accumulation": "mean"}, "`accumulation` must be one of `sum`, `last`"),
])  # fmt: skip
def test_wrong_arguments_are_named(wrong: dict[str, object], message: str) -> None:
    images, labels = tiny_batch(1)
    with pytest.raises(UsageError, match=message):
        find_paths(make_view(tiny_vit()), images, labels, **wrong)


def test_random_paths_are_seeded_and_do_not_repeat_a_neuron() -> None:
    view = make_view(tiny_vit())
    images, labels = tiny_batch(2)

    def draw(seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return find_paths(view, images, labels, topk=20, method="random", generator=g).neurons

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert all(len(set(block)) == 20 for image in draw(3).tolist() for block in image)
