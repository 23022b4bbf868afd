"""Normalisation layers that compute more than normalisation, and those that hide it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import gradkit as gk
from gradkit.tta.own_forward import AdaptedForward
from gradkit.tta.statistics import (
    AdaptedBatchNorm,
    Mixed,
    Statistics,
    batch_moments,
    install_statistics,
)


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Expanded(nn.BatchNorm2d):
    """BatchNorm's code written out, dropout and activation as children, as in timm."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.5), nn.SiLU()

    def forward(self, x):
        torch._assert(x.ndim == 4, "4D")
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        by_batch = self.training or self.running_mean is None
        keep = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if keep else None,
            self.running_var if keep else None,
            self.weight,
            self.bias,
            by_batch,
            momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class Cast(nn.BatchNorm2d):
    """Converts its input and its statistics."""

    def forward(self, x):
        x = x.double()
        mean, var = self.running_mean.to(x.device).double(), self.running_var.type_as(x)
        assert mean.shape == var.shape
        weight, bias = self.weight.double(), self.bias.double()
        return F.batch_norm(x, mean, var, weight, bias, eps=self.eps).float()


class OnePlus(nn.BatchNorm2d):
    """The weight is not the scale itself, and ε is another."""

    def forward(self, x):
        weight = 1 + self.weight
        return F.batch_norm(x, self.running_mean, self.running_var, weight, self.bias, eps=0.1)


class Builtin(nn.BatchNorm2d):
    def forward(self, x):
        statistics = (self.running_mean, self.running_var)
        return torch.batch_norm(x, self.weight, self.bias, *statistics, False, 0.1, self.eps, False)


class After(nn.BatchNorm2d):
    """Normalises something else than its input."""

    def forward(self, x):
        return x + super().forward(x.square())


class Nested(nn.BatchNorm2d):
    """Holds another BatchNorm, whose call is not its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.inner = nn.BatchNorm2d(channels)

    def forward(self, x):
        return super().forward(self.inner(x).abs())


class Twice(nn.SyncBatchNorm):
    def forward(self, x):
        return super().forward(super().forward(x).relu())


class Named(nn.BatchNorm2d):
    """Attributes of its own under names that an adapted BatchNorm has."""

    def __init__(self, channels):
        super().__init__(channels)
        self.name, self.statistics, self.predecessor_type = 2.0, 3.0, 4.0

    def forward(self, x):
        return super().forward(x) * self.name * self.statistics * self.predecessor_type


class Property(nn.BatchNorm2d):
    """No forward of its own, but what BatchNorm's forward reads is."""

    @property
    def eps(self):
        return 0.5

    @eps.setter
    def eps(self, value):
        pass


OWN = (Activated, Expanded, Cast, OnePlus, Builtin, After, Nested, Twice, Named, Property)


def patched(channels):
    layer = nn.BatchNorm2d(channels)
    before = layer.forward  # bound to the layer, so that it is copied with it
    layer.forward = Doubled(before)
    return layer


class Doubled:
    def __init__(self, forward):
        self.inner = forward

    def __call__(self, x):
        return 2 * self.inner(x)


def parametrised(channels):
    layer = nn.BatchNorm2d(channels)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


MAKERS = {kind.__name__: kind for kind in OWN} | {"patched": patched, "parametrised": parametrised}


def sample(*shape: int, seed: int = 1) -> torch.Tensor:
    return 3.0 + 2.0 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.is_floating_point():
                low = 0.5 if name.endswith(("weight", "running_var")) else -1.0
                tensor.uniform_(low, low + 1.0, generator=generator)
    return layer.eval()


def by_hand(layer: nn.Module, x: torch.Tensor, share: float) -> torch.Tensor:
    """The layer's own forward, each of its BatchNorm calls given the blended statistics."""

    def batch_norm(x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        dims = [0, *range(2, x.dim())]
        mean = share * mean + (1 - share) * x.mean(dims).to(mean)
        var = share * var + (1 - share) * x.var(dims, correction=0).to(var)
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        y = (x - mean.view(shape)) / (var.view(shape) + eps).sqrt()
        return y * weight.view(shape) + bias.view(shape)

    def builtin(x, weight, bias, mean, var, training, momentum, eps, cudnn):
        return batch_norm(x, mean, var, weight, bias, eps=eps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "batch_norm", batch_norm)
        patch.setattr(torch, "batch_norm", builtin)
        return layer(x)


SHARES = {"source": 1.0, "test": 0.0, "mixed": 0.3}


@pytest.mark.parametrize("chosen", SHARES)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_forward_of_ones_own_runs_with_other_statistics(kind: str, chosen: str) -> None:
    layer, x = trained(MAKERS[kind](4)), sample(3, 4, 5, 6)
    expected = by_hand(copy.deepcopy(layer), x, SHARES[chosen])
    model = nn.Sequential(layer)
    statistics = Mixed(0.3) if chosen == "mixed" else chosen
    assert install_statistics(model, statistics)[0] is layer
    actual = model(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("chosen", ["test", Mixed(0.3)])
@pytest.mark.parametrize("kind", MAKERS)
def test_gradients_flow_through_the_current_statistics(kind: str, chosen: str | Mixed) -> None:
    share = 0.0 if chosen == "test" else 0.3
    layer, x = trained(MAKERS[kind](2)), sample(2, 2, 3, 3)
    twin = copy.deepcopy(layer)
    install_statistics(nn.Sequential(layer), chosen)
    gradients = []
    for output, of in ((layer, layer), (lambda x: by_hand(twin, x, share), twin)):
        leaf = x.clone().requires_grad_()
        loss = (output(leaf) * sample(2, 2, 3, 3, seed=2)).sum()
        gradients.append(torch.autograd.grad(loss, (leaf, *of.parameters())))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", MAKERS)
def test_source_statistics_leave_the_layer_alone(kind: str) -> None:
    layer, x = trained(MAKERS[kind](4)), sample(3, 4, 5, 6)
    before, attributes = type(layer), dict(vars(layer))
    expected = layer(x)
    model = nn.Sequential(layer)
    for statistics in ("source", "test", "source"):  # and take back what was exchanged
        install_statistics(model, statistics)
    assert type(layer) is before
    assert vars(layer) == attributes
    assert torch.equal(model(x), expected)
    assert torch.equal(gk.tta.NoAdapt(model)(x), expected)


@pytest.mark.parametrize(
    "kind", [name for name in MAKERS if name not in ("patched", "parametrised")]
)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_adapted_and_independent(kind: str, clone) -> None:
    model, x = nn.Sequential(trained(MAKERS[kind](4))), sample(3, 4, 5, 6)
    install_statistics(model, "test")
    expected, twin = model(x), clone(model)
    assert isinstance(twin[0], AdaptedForward)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    assert torch.equal(twin(x), expected)


def test_the_layer_stays_of_its_class_and_of_its_parameters() -> None:
    layer = trained(Activated(4))
    state = layer.state_dict(keep_vars=True)
    install_statistics(nn.Sequential(layer), "test")
    assert isinstance(layer, Activated)
    assert isinstance(layer, AdaptedForward)
    after = layer.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[name] is state[name] for name in state)
    assert "statistics=BatchStatistics()" in repr(layer)


@pytest.mark.parametrize("kind", [Activated, Expanded])
def test_training_mode_writes_no_statistics_and_reaches_children_only(kind) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(trained(kind(4))), sample(3, 4, 5, 6)
    install_statistics(model, "test")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    expected = model(x)
    dropped = model.train()(x)
    assert model[0].training
    assert torch.equal(dropped, expected) == (kind is Activated)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_further_arguments_and_results() -> None:
    class Conditional(nn.BatchNorm2d):
        def forward(self, x, label, *, gain=1.0):
            return {"y": gain * super().forward(x), "label": label}

    layer, x = trained(Conditional(4)), sample(3, 4, 5, 6)
    install_statistics(layer, "test")
    result = layer(x, "a", gain=2.0)
    expected = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
    torch.testing.assert_close(result["y"], 2 * expected)
    assert result["label"] == "a"


def test_functional_call_swaps_parameters_and_buffers() -> None:
    model, x = nn.Sequential(trained(Activated(4))), sample(3, 4, 5, 6)
    install_statistics(model, Mixed(0.5))
    replacement = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(replacement)
    assert torch.equal(functional_call(model, replacement, (x,)), loaded(x))
    assert not torch.equal(model(x), loaded(x))


def test_statistics_see_the_layer_as_a_batch_norm_of_its_name() -> None:
    seen = []

    class Recording(Statistics):
        def moments(self, layer, x):
            assert isinstance(layer, AdaptedBatchNorm)
            seen.append((layer.name, layer.running_mean.tolist(), layer.weight.tolist(), layer.eps))
            return batch_moments(x)

    model = nn.Sequential(nn.ReLU(), trained(OnePlus(2)))
    install_statistics(model, Recording())
    model(sample(2, 2, 3, 3))
    weight = (1 + model[1].weight).tolist()
    assert seen == [("1", model[1].running_mean.tolist(), weight, 0.1)]


# --- instance normalisation -----------------------------------------------------------------------


class ActivatedInstance(nn.InstanceNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("make", [nn.InstanceNorm2d, ActivatedInstance])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_instance_norm_takes_each_images_own_statistics(make, share: float) -> None:
    layer, x = trained(make(4, affine=True, track_running_stats=True)), sample(3, 4, 5, 6)
    mean = share * layer.running_mean[:, None, None] + (1 - share) * x.mean((2, 3), keepdim=True)
    spread = x.var((2, 3), keepdim=True, correction=0)
    var = share * layer.running_var[:, None, None] + (1 - share) * spread
    expected = (x - mean) / (var + layer.eps).sqrt()
    expected = expected * layer.weight[:, None, None] + layer.bias[:, None, None]
    if make is ActivatedInstance:
        expected = expected.relu()
    statistics = {0.0: "test", 1.0: "source"}.get(share, Mixed(share))
    install_statistics(nn.Sequential(layer), statistics)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x[0]), expected[0], rtol=1e-5, atol=1e-5)  # without a batch


def test_instance_norm_without_running_statistics_is_left_alone() -> None:
    layer = ActivatedInstance(4, affine=True)
    install_statistics(nn.Sequential(nn.BatchNorm2d(4), layer), Mixed(0.5))
    assert type(layer) is ActivatedInstance


# --- what cannot be exchanged ---------------------------------------------------------------------


class ByHand(nn.BatchNorm2d):
    def forward(self, x):
        mean, var = self.running_mean[:, None, None], self.running_var[:, None, None]
        return (x - mean) / (var + self.eps).sqrt() * self.weight[:, None, None]


class HalfByHand(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + self.running_mean[:, None, None]


class Writing(nn.BatchNorm2d):
    def forward(self, x):
        self.running_mean.mul_(0.9)
        return super().forward(x)


class Nothing(nn.BatchNorm2d):
    def forward(self, x):
        return x


class Elsewhere(nn.BatchNorm2d):
    """By a kernel of its own, which no mode sees."""

    def forward(self, x):
        class Kernel(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, mean):
                return x - mean[:, None, None]

            @staticmethod
            def backward(ctx, gradient):
                return gradient, None

        return Kernel.apply(x, self.running_mean)


@pytest.mark.parametrize("kind", [ByHand, HalfByHand, Writing, Nothing, Elsewhere])
def test_what_does_not_normalise_by_batch_norm_is_refused(kind) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), trained(kind(4)))
    x = torch.rand(2, 3, 6, 6)
    adapter = gk.tta.TENT(model, lr=1e-2)
    before = copy.deepcopy(adapter.state_dict())
    message = rf"layer '2' is a {kind.__name__}, whose own forward.*super\(\)\.forward"
    for adapted in (adapter, gk.tta.PTBN(model)):
        with pytest.raises(ValueError, match=message):
            adapted(x)
    after = adapter.state_dict()["model"]
    assert all(torch.equal(after[name], tensor) for name, tensor in before["model"].items())
    if kind is not Writing:
        assert torch.equal(gk.tta.NoAdapt(model)(x), copy.deepcopy(model).eval()(x))


class Frozen(nn.Module):
    """The frozen BatchNorm of detection models: four buffers, and no layer of torch's."""

    def __init__(self, channels):
        super().__init__()
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.5}.items():
            self.register_buffer(name, torch.full((channels,), value))
        self.register_buffer("running_var", torch.full((channels,), 2.0))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return (x - self.running_mean[:, None, None]) * scale[:, None, None]


class InputRange(nn.Module):
    """Running statistics that are no normalisation layer's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x):
        return (x - self.running_mean[:, None, None]) / self.running_var[:, None, None].sqrt()


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.jit.script(nn.BatchNorm2d(3)), "'1' is a BatchNorm2d.*but scripted"),
        (lambda: torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))), "'1.0' is a BatchNorm2d"),
        (lambda: Frozen(3), "'1' is a Frozen.*torch.nn.BatchNorm"),
    ],
)
def test_hidden_running_statistics_are_refused_rather_than_kept(make, message: str) -> None:
    model, x = nn.Sequential(nn.BatchNorm2d(3), make()).eval(), torch.rand(2, 3, 6, 6)
    with pytest.raises(ValueError, match=message):
        install_statistics(model, "test")
    assert type(model[0]) is nn.BatchNorm2d
    assert torch.equal(gk.tta.NoAdapt(model)(x), model(x))
    adapter = gk.tta.TENT(model, lr=1e-2, statistics="source", engine="inplace")
    adapter(x)
    assert adapter.last_step.applied


def test_a_normaliser_of_the_input_is_no_layer() -> None:
    model, x = nn.Sequential(InputRange(), nn.BatchNorm2d(3)), sample(2, 3, 6, 6)
    torch.testing.assert_close(
        gk.tta.PTBN(model)(x).mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0
    )


# --- the whole way --------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["functional", "inplace"])
@pytest.mark.parametrize("method", [gk.tta.TENT, gk.tta.GraTa])
def test_adapting_by_activated_layers_equals_layers_apart(method, engine: str) -> None:
    torch.manual_seed(0)
    joined = nn.Sequential(nn.Conv2d(3, 4, 3), trained(Activated(4)), nn.Conv2d(4, 2, 1))
    apart = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.Conv2d(4, 2, 1)
    )
    for there, here in zip(apart.state_dict().values(), joined.state_dict().values(), strict=True):
        there.copy_(here)
    first, second = method(joined, lr=1e-2, engine=engine), method(apart, lr=1e-2, engine=engine)
    for seed in range(3):
        x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(first(x), second(x), rtol=1e-4, atol=1e-5)
    state = first.state_dict()
    first.reset()
    assert not torch.equal(state["model"]["1.weight"], first.state_dict()["model"]["1.weight"])


@pytest.mark.parametrize("make", [lambda: nn.GroupNorm(2, 4), lambda: nn.InstanceNorm2d(4)])
def test_norms_with_a_forward_of_their_own_that_have_no_statistics(make) -> None:
    base = type(make())

    class Own(base):
        def forward(self, x):
            return super().forward(x).relu()

    own = Own(2, 4) if base is nn.GroupNorm else Own(4, affine=True)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), own).eval(), torch.rand(2, 3, 6, 6)
    assert torch.equal(gk.tta.NoAdapt(model)(x), model(x))
    adapter = gk.tta.TENT(model, lr=1e-2, statistics="source")
    adapter(x)
    assert not torch.equal(adapter.model[1].weight, own.weight)
