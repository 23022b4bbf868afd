"""Several episodes at once equal episodes one by one."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from helpers import as_users_run_it, relative_error, seeded
from torch import nn

import gradkit as gk
from gradkit.testing import bits as plain
from gradkit.tta.episodes import BASES
from tta.references import (
    AFFINE,
    ReferenceAdam,
    gradients,
    images,
    network,
    reference_entropy,
    reference_forward,
)
from tta.references import source_weights as weights_of
from tta.test_every_adapter import ADAPTERS
from tta.test_every_adapter import make as make_adapter
from tta.test_vectorised import ViT


def batch(count: int = 3, side: int = 8, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Images that differ in brightness and contrast, so that their statistics do."""
    x = torch.rand(count, 3, side, side, generator=seeded(1), dtype=torch.float64)
    return (x * torch.linspace(0.3, 1.0, count, dtype=x.dtype).view(-1, 1, 1, 1)).to(dtype)


def one_by_one(make, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    adapter = make(model, episodic=True)
    return torch.cat([adapter(image) for image in x.split(1)])


def agree(make, model: nn.Module, x: torch.Tensor, within: float = 1e-10) -> None:
    """At once and one by one; and the step makes a difference."""
    expected = one_by_one(make, model, x)
    adapter = make(model, episodic="image")
    assert relative_error(adapter(x), expected) < within
    assert relative_error(adapter(x), expected) < within  # again from the start
    before = make(model, episodic="image", predict="before")(x)
    assert relative_error(expected, before) > 100 * within


RECIPES = {
    "TENT": functools.partial(gk.tta.TENT, lr=1e-2),
    "GraTa": functools.partial(gk.tta.GraTa, lr=1e-1),
    "GraTa, views at once": functools.partial(gk.tta.GraTa, lr=1e-1, batched_views=True),
    "MEMO": functools.partial(gk.tta.MEMO, lr=1e-1),
    "MEMO, scales and shifts": functools.partial(gk.tta.MEMO, lr=1e-1, parameters=None),
    "MEMO, views at once": functools.partial(gk.tta.MEMO, lr=1e-1, batched_views=True),
}
STATISTICS = {"source": "source", "test": "test", "mixed": gk.tta.Mixed(0.8)}


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe: str, statistics: str) -> None:
    make = functools.partial(RECIPES[recipe], statistics=STATISTICS[statistics])
    agree(make, network(), batch())


def test_predictions_before_the_step() -> None:
    make = functools.partial(gk.tta.TENT, lr=1e-2, predict="before")
    x, adapter = batch(), make(network(), episodic="image")
    assert relative_error(adapter(x), one_by_one(make, network(), x)) < 1e-10
    assert adapter.facts["losses"]["loss"].shape == (3,)


@pytest.mark.parametrize("recipe", ["TENT", "GraTa", "MEMO"])
def test_single_precision(recipe: str) -> None:
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    make = functools.partial(RECIPES[recipe], optimizer=optimizer)
    x, model = batch(dtype=torch.float32), network(torch.float32)
    adapter = make(model, episodic="image")
    assert relative_error(adapter(x), one_by_one(make, model, x)) < 1e-5


@pytest.mark.parametrize("recipe", ["TENT", "GraTa", "MEMO, scales and shifts"])
@pytest.mark.parametrize(
    "layer",
    [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm([4, 8, 8])],
    ids=type,
)
def test_other_normalisation(layer: nn.Module, recipe: str) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), layer, nn.ReLU(), nn.Conv2d(4, 2, 1))
    agree(functools.partial(RECIPES[recipe], statistics="source"), model.double(), batch())


def test_a_transformer_that_classifies() -> None:
    torch.manual_seed(0)
    make = functools.partial(gk.tta.GraTa, lr=1e-1, statistics="source")
    agree(make, ViT().double(), batch(side=16))


def test_it_equals_an_independent_reference() -> None:
    model, x = network(), torch.cat(images(3))
    found = gk.tta.TENT(model, lr=1e-2, steps=2, episodic="image")(x)
    for image, logits in zip(x.split(1), found.split(1), strict=True):
        weights, adam = weights_of(model), ReferenceAdam()
        for _ in range(2):
            loss = functools.partial(_entropy_of, x=image)
            adam.step(weights, gradients(weights, AFFINE, loss), 1e-2)
        torch.testing.assert_close(logits, reference_forward(weights, image), rtol=1e-9, atol=1e-9)


def _entropy_of(weights, x):
    return reference_entropy(reference_forward(weights, x))


SERVED = {"TENT", "GraTa", "MEMO"}
OPTIONS = {
    "SGD": {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True},
    "Adam": {"amsgrad": True},
    "AdamW": {"weight_decay": 0.5},
    "RMSprop": {"momentum": 0.9},
}


@pytest.mark.parametrize("base", BASES)
def test_optimizers(base: type[torch.optim.Optimizer]) -> None:
    """Two steps, the second from each image's own state, with each image's own learning rate."""

    def optimizer(parameters):
        groups = [{"params": parameters[:2], "lr": 0.05}, {"params": parameters[2:]}]
        return base(groups, lr=0.02, **OPTIONS.get(base.__name__, {}))

    make = functools.partial(gk.tta.GraTa, optimizer=optimizer, steps=2)
    agree(make, network(), batch(2))


@pytest.mark.parametrize(
    "transforms",
    [
        (gk.CosineLR("a", "b", activation="linear"),),
        (gk.LookAhead("a", "b", step_size=0.5),),
        (gk.LookAhead("b", "a"), gk.CosineLR("c", "a", activation=lambda c: float(c) / 2 + 1)),
    ],
    ids=["cosine", "look-ahead", "both, with a third objective"],
)
def test_transforms(transforms) -> None:
    def make(model, **options):
        return gk.tta.Adapter(
            model,
            statistics="test",
            objectives={
                "a": gk.tta.entropy,
                "b": gk.tta.Consistency(generator=seeded(3)),
                "c": lambda model, x: model(x).square().mean(),
            },
            transforms=transforms,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            **options,
        )

    agree(make, network(), batch())


def test_one_image_does_not_see_another() -> None:
    adapter, x = gk.tta.GraTa(network(), lr=1e-1, episodic="image"), batch(3)
    changed = x.clone()
    changed[1] = 1 - changed[1]
    first, second = adapter(x), adapter(changed)
    assert relative_error(second[0], first[0]) < 1e-12
    assert relative_error(second[2], first[2]) < 1e-12
    assert relative_error(second[1], first[1]) > 1e-2


def test_all_images_have_the_same_draws_as_alone() -> None:
    """One by one, the generator starts anew for each image."""
    drawn = []

    class Recorded(gk.tta.StrongAugmentation):
        def __call__(self, image, generator):
            drawn.append(torch.rand(1, generator=generator).item())
            return super().__call__(image, generator)

    def make(model, **options):
        pseudo = gk.tta.Consistency(augmentation=Recorded(), generator=seeded(7))
        return gk.tta.GraTa(model, lr=1e-1, pseudo=pseudo, steps=2, **options)

    x = batch(2)
    expected = one_by_one(make, network(), x)
    one, two = drawn[0], drawn[1]
    assert drawn == [one, two, one, two]
    drawn.clear()
    assert relative_error(make(network(), episodic="image")(x), expected) < 1e-10
    assert drawn == [one, one, two, two]


class NoiseConsistency:
    """An objective of one's own, with a generator."""

    def __init__(self) -> None:
        self.generator = seeded(5)

    def draw(self, image):
        return image + 0.1 * torch.randn(image.shape, generator=self.generator).to(image)

    def given(self, model, image, drawn):
        return (model(drawn) - model(image).detach()).square().mean()

    def __call__(self, model, image):
        return self.given(model, image, self.draw(image))

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict):
        self.generator.set_state(state_dict["generator"])


def test_an_objective_of_ones_own_that_draws() -> None:
    make = functools.partial(gk.tta.TENT, objective=NoiseConsistency(), lr=1e-2, steps=2)
    agree(make, network(), batch())


def test_nothing_is_kept() -> None:
    model = network()
    adapter, x = gk.tta.GraTa(model, lr=1e-1, episodic="image"), batch(2)
    before, source = plain(adapter.state_dict()), plain(model.state_dict())
    expected = adapter(x)
    assert plain(adapter.state_dict()) == before
    assert plain(model.state_dict()) == source
    assert adapter.last_step is None
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert torch.equal(twin(x), expected)
    # An adapter's state is no part of an episode.
    other = gk.tta.GraTa(network(), lr=1e-1)
    other(x[:1])
    adapter.load_state_dict(other.state_dict())
    assert torch.equal(adapter(x), expected)


def test_an_adapter_that_has_moved_to_another_precision() -> None:
    adapter = gk.tta.TENT(network(), lr=1e-2, episodic="image")
    adapter.model.float()
    x = batch(dtype=torch.float32)
    expected = gk.tta.TENT(network().float(), lr=1e-2, episodic="image")(x)
    assert relative_error(adapter(x), expected) < 1e-5


def test_facts_are_by_image() -> None:
    adapter, x = gk.tta.GraTa(network(), lr=1e-1, episodic="image"), batch()
    adapter(x)
    alone = gk.tta.GraTa(network(), lr=1e-1, episodic=True)
    for k, image in enumerate(x.split(1)):
        alone(image)
        record = alone.last_step
        assert adapter.facts["lr_scale"][k].item() == pytest.approx(record.lr_scale.item())
        assert adapter.facts["cosine"][k].item() == pytest.approx(
            record.cosine("pseudo", "auxiliary").item()
        )
        for name, loss in zip(record.names, record.losses, strict=True):
            assert adapter.facts["losses"][name][k].item() == pytest.approx(loss.item())


def test_a_parameter_that_nothing_reaches_is_left_alone() -> None:
    class WithSpare(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*network())
            self.spare = nn.BatchNorm2d(3).double()

        def forward(self, x):
            for layer in list(self)[:-1]:
                x = layer(x)
            return x

    def optimizer(parameters):
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.5)

    agree(functools.partial(gk.tta.TENT, optimizer=optimizer), WithSpare(), batch())


class Halved(gk.tta.Consistency):
    def __call__(self, model, image):
        return super().__call__(model, image) / 2


REFUSED = {
    "transform": ({"transforms": (gk.SAM(),)}, r"transforms are SAM.*one image at a time"),
    "order": (
        {"transforms": (gk.CosineLR("loss", "loss"), gk.LookAhead("loss", "other"))},
        "or both in this order",
    ),
    "optimizer": (
        {"optimizer": lambda p: torch.optim.Adagrad(p, lr=1e-2)},
        "optimizer is Adagrad; .* choose one of these",
    ),
    "statistics": ({"statistics": gk.tta.DynamicStatistics()}, "learn from batches"),
    "running statistics": ({"statistics": gk.tta.RunningStatistics()}, "learn from batches"),
    "predict": ({"predict": lambda model, x: model(x)}, 'take "after" or "before"'),
    "restore": ({"restore": gk.tta.Pull(0.01)}, "restore is .*Pull"),
    "nonfinite": ({"nonfinite": "skip"}, "nonfinite is 'skip'"),
    "max_norm": ({"max_norm": 1.0}, r"max_norm is 1\.0"),
    "state": ({"objectives": {"loss": gk.tta.ReliableEntropy()}}, "one image at a time"),
    "teacher": ({"objectives": {"loss": gk.tta.TeacherTarget()}}, "one image at a time"),
    "overridden": ({"objectives": {"loss": Halved()}}, "Halved, which has a __call__ of its own"),
    "missing": ({"transforms": (gk.CosineLR("loss", "other"),)}, "need an objective 'other'"),
    "nothing": ({"objectives": None, "optimizer": None}, "there are no objectives"),
    "choice": ({"episodic": "batch"}, 'choose False, True or "image"'),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_exact_is_refused_at_once(what: str) -> None:
    options, message = REFUSED[what]
    if what == "teacher":
        options = {**options, "transforms": lambda student: (gk.EMA(student, decay=0.9),)}
    arguments = {
        "statistics": "test",
        "objectives": {"loss": gk.tta.entropy},
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "episodic": "image",
        **options,
    }
    with as_users_run_it(), pytest.raises(ValueError, match=message):
        gk.tta.Adapter(network(), **arguments)


def test_learning_without_a_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing would be learnt"):
        make_adapter("TENT", episodic="image").adapt(batch(1))


@pytest.mark.parametrize("name", sorted(SERVED))
def test_adapters_that_are_served(name: str) -> None:
    x, alone = batch(2), make_adapter(name, episodic=True)
    expected = torch.cat([alone(image) for image in x.split(1)])
    assert relative_error(make_adapter(name, episodic="image")(x), expected) < 1e-10


@pytest.mark.parametrize("name", sorted(ADAPTERS.keys() - SERVED))
def test_all_other_adapters_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"one image at a time|there are no objectives"):
        make_adapter(name, episodic="image")


def branching(model, x):
    return model(x).mean() if float(x.sum()) > 0 else model(x).sum()


def drawing(model, x):
    return (model(x) * torch.rand(())).mean()


@pytest.mark.parametrize(
    ("objective", "error", "message"),
    [
        (branching, RuntimeError, r"objective 'loss' cannot be evaluated for several images"),
        (drawing, RuntimeError, r"random operation.*one image at a time"),
        (lambda model, x: None, ValueError, "returned None for one image"),
        (lambda model, x: model(x).mean((2, 3)), ValueError, r"returned shape \[1, 2\]"),
        (lambda model, x: x.mean(), RuntimeError, "has no gradient"),
        (lambda model, x: x.mean() * torch.ones((), requires_grad=True), RuntimeError, "has no gr"),
        (lambda model, x: (model(x) / 0).mean(), gk.NonFiniteError, "for image 0 of the batch"),
    ],
    ids=["branch", "random", "none", "shape", "constant", "elsewhere", "not finite"],
)
def test_objectives_that_cannot_be_vectorised_leave_all_as_it_was(
    objective, error, message
) -> None:
    adapter = gk.tta.TENT(network(), objective=objective, episodic="image")
    before = plain(adapter.state_dict())
    with pytest.raises(error, match=message):
        adapter(batch())
    assert plain(adapter.state_dict()) == before
    assert adapter.facts == {}


def test_the_image_that_is_not_finite_is_named() -> None:
    x = batch()
    x[1, 0, 0, 0] = torch.nan
    adapter = gk.tta.GraTa(network(), episodic="image")
    before = plain(adapter.state_dict())
    with pytest.raises(gk.NonFiniteError, match=r"objective 'auxiliary' is nan for image 1"):
        adapter(x)
    assert plain(adapter.state_dict()) == before
    ignoring = gk.tta.GraTa(network(), episodic="image", nonfinite="ignore")
    assert torch.isfinite(ignoring(x)[[0, 2]]).all()


def test_a_model_that_cannot_be_vectorised() -> None:
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    adapter = gk.tta.TENT(nn.Sequential(network(), Branching()), episodic="image")
    with pytest.raises(RuntimeError, match=r"cannot be evaluated for several images at once"):
        adapter(batch())


def test_a_model_whose_buffers_or_results_are_of_another_kind() -> None:
    class Counting(nn.BatchNorm2d):
        def forward(self, x):
            self.num_batches_tracked.add_(1)
            return super().forward(x)

    model = network()
    model[1] = Counting(4).double()
    adapter = gk.tta.TENT(model, episodic="image", statistics="source")
    with pytest.raises(RuntimeError, match=r"writes its buffer '1.num_batches_tracked'"):
        adapter(batch())
    assert adapter.model[1].num_batches_tracked == 0

    class Named(nn.Sequential):
        def forward(self, x):
            return {"logits": super().forward(x)}

    adapter = gk.tta.TENT(
        Named(*network()), objective=lambda model, x: model(x)["logits"].mean(), episodic="image"
    )
    with pytest.raises(ValueError, match="returned a dict; several images at once need a tensor"):
        adapter(batch())


def test_autocast_and_no_images() -> None:
    adapter = gk.tta.TENT(network(), episodic="image")
    with pytest.raises(ValueError, match="there are none to adapt to"):
        adapter(batch(0))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match=r"torch.autocast does not reach"),
    ):
        adapter(batch())
