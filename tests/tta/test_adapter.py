"""Adapters: what they compute, what they keep, and what they leave alone."""

from __future__ import annotations

import copy
import io
import pickle
import signal
import warnings

import pytest
import torch
from helpers import as_users_run_it
from torch import nn
from torch.nn.utils import prune

import gradkit as gk
from gradkit.testing import bits as plain
from tta.references import images, network, reference_forward

METHODS = {
    "none": gk.tta.NoAdapt,
    "ptbn": gk.tta.PTBN,
    "tent": lambda model, **options: gk.tta.TENT(model, lr=1e-2, **options),
    "grata": lambda model, **options: gk.tta.GraTa(model, lr=1e-2, **options),
    "chain": lambda model, **options: gk.tta.Adapter(
        model,
        objectives={"pseudo": gk.tta.Consistency(), "auxiliary": gk.tta.binary_entropy},
        transforms=lambda adapted: (
            gk.PCGrad(),
            gk.SAM(),
            gk.EMA(adapted, decay=0.9, warmup=True),
        ),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        **options,
    ),
}


def test_baselines() -> None:
    model = network()
    x = images(1)[0]
    assert torch.equal(gk.tta.NoAdapt(model)(x), copy.deepcopy(model).eval()(x))
    torch.testing.assert_close(
        gk.tta.PTBN(model)(x), reference_forward(dict(model.named_parameters()), x)
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_source_model_is_never_changed(method: str) -> None:
    model = network()
    model.train()
    model[0].weight.requires_grad_(False)
    before = plain(model.state_dict())
    random = torch.get_rng_state()
    adapter = METHODS[method](model)
    for x in images(2):
        adapter(x)
    adapter.reset()
    assert plain(model.state_dict()) == before
    assert model.training
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())
    assert type(model[1]) is nn.BatchNorm2d
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("method", METHODS)
def test_reset_is_bit_exact(method: str) -> None:
    adapter = METHODS[method](network())
    start = plain(adapter.state_dict())
    first = [adapter(x) for x in images(4)]
    if method in ("tent", "grata", "chain"):
        assert plain(adapter.state_dict()) != start
    adapter.reset()
    assert plain(adapter.state_dict()) == start
    assert adapter.last_step is None
    assert plain([adapter(x) for x in images(4)]) == plain(first)


@pytest.mark.parametrize("method", METHODS)
def test_state_is_a_snapshot_that_survives_a_file(method: str) -> None:
    stream = images(5)
    adapter = METHODS[method](network())
    for x in stream[:3]:
        adapter(x)
    state = adapter.state_dict()
    before = plain(state)
    rest = [adapter(x) for x in stream[3:]]
    assert plain(state) == before  # what comes later does not reach it
    adapter.load_state_dict(state)
    assert plain([adapter(x) for x in stream[3:]]) == plain(rest)

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    fresh = METHODS[method](network())
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert plain([fresh(x) for x in stream[3:]]) == plain(rest)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_go_on_alike(duplicate) -> None:
    adapter = gk.tta.TENT(network(), lr=1e-2, optimizer=make_adam)
    adapter(images(1)[0])
    twin = duplicate(adapter)
    assert plain([adapter(x) for x in images(3)]) == plain([twin(x) for x in images(3)])
    assert plain(adapter.state_dict()) == plain(twin.state_dict())


def make_adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def test_episodic_starts_anew_for_each_batch() -> None:
    stream = images(3)
    adapter = gk.tta.GraTa(network(), lr=1e-2, episodic=True)
    alone = [gk.tta.GraTa(network(), lr=1e-2)(x) for x in stream]
    assert plain([adapter(x) for x in stream]) == plain(alone)


class Counting(gk.tta.Statistics):
    """Test statistics that count the forward passes."""

    def __init__(self) -> None:
        self.count = 0

    def moments(self, layer, x):
        self.count += 1
        mean = x.mean(dim=(0, 2, 3))
        return mean, (x - mean.view(1, -1, 1, 1)).square().mean(dim=(0, 2, 3))

    def reset(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


class Failing:
    def __init__(self, error: BaseException) -> None:
        self.error, self.armed = error, False

    def __call__(self, model, x):
        loss = gk.tta.entropy(model, x)
        if self.armed:
            raise self.error
        return loss


@pytest.mark.parametrize("episodic", [False, True])
@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["pseudo", "auxiliary"])
def test_an_objective_that_raises_leaves_no_trace(where: str, error, episodic: bool) -> None:
    failing = Failing(error)
    objectives = {"pseudo": gk.tta.Consistency(), "auxiliary": gk.tta.entropy, "extra": failing}
    if where == "pseudo":
        objectives = {"extra": failing, **objectives}
    adapter = gk.tta.Adapter(
        network(),
        statistics=Counting(),
        objectives=objectives,
        transforms=(gk.PCGrad(), gk.LookAhead()),
        optimizer=make_adam,
        episodic=episodic,
    )
    for x in images(2):
        adapter(x)
    before, last = plain(adapter.state_dict()), adapter.last_step
    failing.armed = True
    with pytest.raises(type(error)):
        adapter(images(3)[2])
    assert plain(adapter.state_dict()) == before
    assert adapter.last_step is last


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_after_the_step_rewinds_nothing() -> None:
    class Interrupted(torch.optim.Adam):
        armed = False

        def step(self, closure=None):
            if self.armed:
                signal.raise_signal(signal.SIGINT)
            return super().step(closure)

    adapter = gk.tta.GraTa(network(), optimizer=lambda p: Interrupted(p, lr=1e-2))
    twin = gk.tta.GraTa(network(), optimizer=make_adam)
    stream = images(3)
    for each in (adapter, twin):
        each(stream[0])
    adapter.optimizer.base.armed = True
    with pytest.raises(KeyboardInterrupt):
        adapter(stream[1])
    twin(stream[1])
    adapter.optimizer.base.armed = False
    assert plain(adapter(stream[2])) == plain(twin(stream[2]))


class Listed(nn.Module):
    """Reaches its layers by a list that torch does not know of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)
        self.layers = [self.first, self.norm]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_are_reached_by_a_list() -> None:
    model, x = Listed().eval(), torch.rand(1, 3, 8, 8)
    adapted = gk.tta.PTBN(model)(x)
    assert torch.allclose(adapted.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-6)
    assert not torch.equal(adapted, gk.tta.NoAdapt(model)(x))


def test_adapters_share_nothing() -> None:
    consistency = gk.tta.Consistency()
    model = network()

    def make() -> gk.tta.Adapter:
        return gk.tta.GraTa(model, lr=1e-2, pseudo=consistency)

    first, second = make(), make()
    alone = [make()(x) for x in images(1)]
    first(images(1)[0])
    assert plain([second(x) for x in images(1)]) == plain(alone)
    assert torch.equal(
        consistency.generator.get_state(), torch.Generator().manual_seed(0).get_state()
    )


def test_a_teacher_follows_the_copy() -> None:
    model = network()
    with pytest.raises(ValueError, match="pass transforms=lambda model"):
        gk.tta.Adapter(
            model,
            objectives={"loss": gk.tta.entropy},
            transforms=(gk.EMA(model, decay=0.5),),
            optimizer=make_adam,
        )
    adapter = METHODS["chain"](model)
    before = plain(adapter.optimizer.transforms[2].teacher.state_dict())
    adapter(images(1)[0])
    assert plain(adapter.optimizer.transforms[2].teacher.state_dict()) != before
    adapter.reset()
    assert plain(adapter.optimizer.transforms[2].teacher.state_dict()) == before


def test_options_reach_the_optimizer() -> None:
    adapter = gk.tta.TENT(network(), nonfinite="skip", max_norm=1.0, engine="inplace")
    before = plain(adapter.state_dict())
    adapter(torch.full((1, 3, 8, 8), torch.nan, dtype=torch.float64))
    assert not adapter.last_step.applied
    assert plain(adapter.state_dict()) == before


def test_other_parameters_can_be_chosen() -> None:
    adapter = gk.tta.Adapter(
        network(),
        objectives={"loss": gk.tta.entropy},
        optimizer=make_adam,
        parameters=lambda model: model[7].parameters(),
    )
    adapter(images(1)[0])
    assert set(adapter.state_dict()["model"]) >= {"7.weight", "7.bias"}
    assert torch.equal(adapter.model[1].weight, network()[1].weight)
    assert not torch.equal(adapter.model[7].weight, network()[7].weight)


# --- which images ---------------------------------------------------------------------------------


class Tagged(torch.Tensor):
    """A tensor with something to say, as MONAI's MetaTensor is; every result of it is one."""


@pytest.mark.parametrize("method", METHODS)
def test_images_of_a_subclass_are_as_plain_ones(method: str) -> None:
    first, second = METHODS[method](network()), METHODS[method](network())
    for x in images(3):
        logits = second(x.as_subclass(Tagged))
        assert type(logits) is torch.Tensor
        assert torch.equal(logits, first(x))
    for name, tensor in second.state_dict()["model"].items():
        assert type(tensor) is torch.Tensor, name


@pytest.mark.parametrize("method", METHODS)
def test_channels_last_changes_rounding_only(method: str) -> None:
    plain_adapter = METHODS[method](network())
    last = METHODS[method](network().to(memory_format=torch.channels_last))
    for x in images(3):
        logits = last(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(logits, plain_adapter(x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_images_under_autocast(method: str) -> None:
    half, exact = METHODS[method](network(torch.float32)), METHODS[method](network(torch.float32))
    for x in images(3, torch.float32):
        x = x.bfloat16()
        expected = exact(x.float())
        with torch.autocast("cpu", torch.bfloat16):
            logits = half(x)
        torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "reparametrise",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.random_unstructured(layer, "weight", amount=0.3),
        nn.utils.parametrizations.weight_norm,
    ],
    ids=["weight norm", "spectral norm", "pruning", "parametrisation"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_layers_that_keep_a_computed_weight(reparametrise) -> None:
    """After a pass with gradients that weight has a graph, which deepcopy refuses."""
    torch.manual_seed(0)
    model = nn.Sequential(reparametrise(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    x = torch.rand(2, 3, 8, 8)
    model(x).sum().backward()
    model.zero_grad()
    expected = model.eval()(x)
    torch.testing.assert_close(gk.tta.NoAdapt(model)(x), expected.detach())
    for make in (gk.tta.TENT, gk.tta.CoTTA):
        adapter = make(model, lr=1e-2)
        adapter(x)
        assert adapter.last_step.applied
        assert torch.equal(model(x), expected)


def test_a_model_that_cannot_be_copied_is_named() -> None:
    model = network()
    model.log = (each for each in ())  # cannot be copied
    with pytest.raises(ValueError, match="the model, a Sequential, cannot be copied"):
        gk.tta.TENT(model)


def test_half_precision_weights_need_an_epsilon_that_is_not_0() -> None:
    model, x = network(torch.float16), images(1, torch.float16)[0]
    with pytest.raises(ValueError, match=r"eps=1e-08, which is 0 in torch\.float16.*autocast"):
        gk.tta.TENT(model)
    adapter = gk.tta.TENT(
        model, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2, eps=1e-4)
    )
    adapter(x)
    assert all(torch.isfinite(parameter).all() for parameter in adapter.trained().values())
    gk.tta.SAR(model)  # SGD has none
    gk.tta.TENT(network(torch.bfloat16))


def test_scripted_children_are_copied_and_trained_around() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = torch.jit.script(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1)))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), head)
    adapter = gk.tta.TENT(model, lr=1e-2, engine="inplace")
    adapter(images(1, torch.float32)[0])
    assert not torch.equal(adapter.model[1].weight, model[1].weight)


def test_images_out_of_the_augmentations_range_are_refused_before_anything_runs() -> None:
    adapter = gk.tta.GraTa(network(), lr=1e-2)
    adapter(images(1)[0])
    before, last, forwards = plain(adapter.state_dict()), adapter.last_step, []
    adapter.model[0].register_forward_hook(lambda *_: forwards.append(1))
    x = images(1)[0]
    for wrong, found in ((255 * x, r"\[0\.\d+, 25\d"), (4 * x - 2, r"\[-1\.\d+, 1\.\d+\]")):
        with pytest.raises(ValueError, match=rf"{found}.*nn\.Sequential\(normalise, model\)"):
            adapter(wrong)
    with as_users_run_it(), pytest.raises(ValueError, match=r"torch\.uint8"):
        adapter((255 * x).byte())
    assert forwards == []
    assert plain(adapter.state_dict()) == before
    assert adapter.last_step is last
    adapter(1.05 * x - 0.03)  # as interpolation overshoots
    gk.tta.TENT(network())(4 * x - 2)  # no augmentation, no range


def test_images_that_are_not_finite_are_left_to_nonfinite() -> None:
    adapter = gk.tta.GraTa(network(), nonfinite="skip")
    for value in (torch.nan, torch.inf):
        adapter(torch.full((1, 3, 8, 8), value, dtype=torch.float64))
        assert not adapter.last_step.applied


# --- inference mode -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tent", "grata", "chain"])
def test_inference_mode_is_refused_with_its_remedy(method: str) -> None:
    adapter, x = METHODS[method](network()), images(1)[0]
    before = plain(adapter.state_dict())
    with torch.inference_mode():
        for adapt in (lambda: adapter(x), lambda: METHODS[method](network())):
            with pytest.raises(RuntimeError, match=r"Trainer\(inference_mode=False\)"):
                adapt()
        made_here = x.clone()
    assert plain(adapter.state_dict()) == before
    twin = METHODS[method](network())
    assert torch.equal(adapter(made_here), twin(x))
    with torch.no_grad():
        assert torch.equal(adapter(x), twin(x))


@pytest.mark.parametrize("method", ["none", "ptbn"])
def test_what_takes_no_gradient_works_under_inference_mode(method: str) -> None:
    x = images(1)[0]
    expected = METHODS[method](network())(x)
    with torch.inference_mode():
        assert torch.equal(METHODS[method](network())(x), expected)


def bad(call):
    return pytest.param(*call[1:], id=call[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        bad(case)
        for case in (
            (
                "no optimizer",
                lambda m: gk.tta.Adapter(m, objectives={"loss": gk.tta.entropy}),
                "no optimizer",
            ),
            ("no objectives", lambda m: gk.tta.Adapter(m, optimizer=make_adam), "no objectives"),
            ("statistics", lambda m: gk.tta.PTBN(m, statistics="batch"), "'batch'"),
            ("no norm", lambda m: gk.tta.PTBN(nn.Conv2d(3, 2, 1)), "no BatchNorm"),
            (
                "nothing to train",
                lambda m: gk.tta.TENT(nn.Conv2d(3, 2, 1), statistics="source"),
                "parameters=lambda model",
            ),
            (
                "the source's parameters",
                lambda m: gk.tta.Adapter(
                    m,
                    objectives={"loss": gk.tta.entropy},
                    optimizer=make_adam,
                    parameters=lambda _: m.parameters(),
                ),
                "not the adapted copy's",
            ),
            (
                "generator beside pseudo",
                lambda m: gk.tta.GraTa(m, pseudo=gk.tta.entropy, generator=torch.Generator()),
                "which pseudo replaces",
            ),
        )
    ],
)
def test_bad_arguments(make, message: str) -> None:
    model = network().requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        make(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_state_of_another_adapter_is_refused_and_changes_nothing() -> None:
    tent = gk.tta.TENT(network(), lr=1e-2)
    tent(images(1)[0])
    before = plain(tent.state_dict())
    whole = tent.state_dict()
    without = {name: value for name, value in whole.items() if name != "statistics"}
    other = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).double()
    for state, message in (
        ({}, "entries none"),
        (without, "the entries"),
        (gk.tta.GraTa(network()).state_dict(), "'objectives'"),
        (gk.tta.TENT(other).state_dict(), "'model'"),
        (gk.tta.PTBN(network()).state_dict(), "'model'"),
        ({**whole, "optimizer": None}, "other objectives"),
        ({**whole, "teachers": [{}]}, "other teachers"),
        ({**whole, "statistics": {"seen": 3}}, "'statistics'"),
    ):
        with pytest.raises(ValueError, match=message):
            tent.load_state_dict(state)
        assert plain(tent.state_dict()) == before


def test_repr_names_the_choices() -> None:
    text = repr(gk.tta.GraTa(network(), statistics=gk.tta.Mixed(0.7)))
    assert "Mixed(share=0.7)" in text
    assert "'pseudo', 'auxiliary'" in text
    assert "LookAhead" in text


def test_images_that_are_no_tensor_are_named() -> None:
    """An array, or a batch of a loader with its labels; methods without gradients, too."""
    batch = images(1)[0].float()
    for make in (gk.tta.TENT, gk.tta.PTBN):
        adapter = make(network(torch.float32))
        for wrong, name in ((batch.numpy(), "ndarray"), ([batch, torch.zeros(1)], "list")):
            for call in (adapter, adapter.adapt):
                with as_users_run_it(), pytest.raises(TypeError, match=f"images is a {name}; pass"):
                    call(wrong)


def test_adapting_without_a_prediction() -> None:
    silent, twin = gk.tta.GraTa(network(), lr=1e-2), gk.tta.GraTa(network(), lr=1e-2)
    forwards = []
    silent.model[0].register_forward_hook(lambda *_: forwards.append(1))
    x, y = images(2)
    assert silent.adapt(x) is None
    assert len(forwards) == 8  # one less than in a call
    expected = twin(x)
    with torch.no_grad():
        assert torch.equal(silent.model(x), expected)
    assert plain(silent.state_dict()) == plain(twin.state_dict())
    assert torch.equal(silent(y), twin(y))
    with pytest.raises(ValueError, match="works on images in"):
        silent.adapt(10 * x)


# --- parts ----------------------------------------------------------------------------------------


def test_the_prediction_is_a_choice() -> None:
    stream = images(2)
    source, after = gk.tta.PTBN(network()), gk.tta.TENT(network(), lr=1e-2)
    before = gk.tta.TENT(network(), lr=1e-2, predict="before")
    own = gk.tta.TENT(network(), lr=1e-2, predict=lambda model, x: 2 * model(x))
    assert torch.equal(before(stream[0]), source(stream[0]))
    first = after(stream[0])
    assert not torch.allclose(first, source(stream[0]))
    assert torch.equal(own(stream[0]), 2 * first)
    assert torch.equal(before(stream[0]), first)
    with as_users_run_it(), pytest.raises(ValueError, match="predict is 'later'"):
        gk.tta.TENT(network(), predict="later")


def test_several_steps_for_each_batch() -> None:
    one, three = gk.tta.TENT(network(), lr=1e-2), gk.tta.TENT(network(), lr=1e-2, steps=3)
    x = images(1)[0]
    expected = [one(x) for _ in range(3)][-1]
    assert torch.equal(three(x), expected)
    with pytest.raises(ValueError, match="steps is 0"):
        gk.tta.TENT(network(), steps=0)
    with pytest.raises(ValueError, match="no objectives"):
        gk.tta.PTBN(network(), steps=2)


def test_a_later_step_that_raises_undoes_the_earlier_ones() -> None:
    failing, calls = Failing(KeyError("mine")), []

    def objective(model, x):
        calls.append(1)
        failing.armed = len(calls) == 2
        return failing(model, x)

    adapter = gk.tta.Adapter(
        network(), objectives={"loss": objective}, optimizer=make_adam, steps=2
    )
    before = plain(adapter.state_dict())
    with pytest.raises(KeyError):
        adapter(images(1)[0])
    assert plain(adapter.state_dict()) == before
    assert adapter.last_step is None


def test_objectives_are_made_for_the_copy() -> None:
    source, copies = network(), []

    def objectives(model):
        copies.append(model)
        return {"loss": lambda _, x: gk.tta.entropy(model, x)}

    adapter = gk.tta.Adapter(source, objectives=objectives, optimizer=make_adam)
    twin = gk.tta.Adapter(source, objectives={"loss": gk.tta.entropy}, optimizer=make_adam)
    assert copies == [adapter.model]
    for x in images(2):
        assert torch.equal(adapter(x), twin(x))
    with as_users_run_it(), pytest.raises(TypeError, match="objectives is a list"):
        gk.tta.Adapter(source, objectives=lambda model: [], optimizer=make_adam)


class Part:
    """An objective that uses all that a part may have."""

    def __init__(self) -> None:
        self.facts: dict[str, float] = {}
        self.log: list[str] = []

    def attach(self, adapter) -> None:
        self.teacher, self.model = adapter.teacher, adapter.model
        self.log.append("attach")

    def check_images(self, x) -> None:
        self.log.append("check")

    def begin_step(self, x) -> None:
        self.log.append("begin")

    def __call__(self, model, x):
        self.log.append("call")
        assert model is self.model
        with torch.no_grad():
            target = torch.sigmoid(self.teacher(x))
        loss = (torch.sigmoid(model(x)) - target + 0.1).square().mean()
        self.facts = {"distance": float(loss.detach())}
        return loss


def test_a_part_sees_the_teacher_and_is_called_in_order() -> None:
    given = Part()
    adapter = gk.tta.Adapter(
        network(),
        objectives={"loss": given},
        transforms=lambda model: (gk.EMA(model, decay=0.9),),
        optimizer=make_adam,
        steps=2,
    )
    part = adapter.objectives["loss"]
    assert part is not given  # it keeps something, so each adapter has its own
    assert given.log == []
    assert part.teacher is adapter.teacher is adapter.optimizer.transforms[0].teacher
    adapter(images(1)[0])
    assert part.log == ["attach", "check", "begin", "call", "begin", "call"]
    assert adapter.facts == {"distance": float(adapter.last_step.losses)}
    twin = copy.deepcopy(adapter)
    assert twin.objectives["loss"].teacher is twin.teacher is not adapter.teacher


def test_an_objective_may_abstain() -> None:
    adapter = gk.tta.Adapter(
        network(),
        objectives={"loss": lambda model, x: None},
        optimizer=make_adam,
        restore=lambda adapter: 1 / 0,  # which is for applied steps
        on_empty="skip",
    )
    before = plain(adapter.state_dict())
    adapter(images(1)[0])
    assert not adapter.last_step.applied
    assert plain(adapter.state_dict()) == before
