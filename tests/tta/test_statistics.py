import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from gradkit.tta.statistics import (
    AdaptedBatchNorm,
    BatchStatistics,
    Mixed,
    SourceStatistics,
    Statistics,
    batch_moments,
    install_statistics,
    norm_affine_parameters,
    normalise_with,
    resolve_statistics,
    source_moments,
)

KINDS = {
    "1d": (nn.BatchNorm1d, (6, 4)),
    "1d sequence": (nn.BatchNorm1d, (3, 4, 5)),
    "2d": (nn.BatchNorm2d, (3, 4, 5, 6)),
    "3d": (nn.BatchNorm3d, (2, 4, 3, 4, 5)),
    "synchronised": (nn.SyncBatchNorm, (3, 4, 5, 6)),
}
ALL = ["source", "test", Mixed(0.3)]


def trained(layer, seed=0):
    """A BatchNorm with affine parameters and statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (layer.weight, layer.running_var):
            if tensor is not None:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        for tensor in (layer.bias, layer.running_mean):
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return layer


def sample(shape, seed=1):
    return 3.0 + 2.0 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_network():
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)),
    )
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            trained(layer)
    return network


def reference(layer, x, share):
    """The blended normalisation in NumPy and float64; share 1 is the source, 0 the test batch."""
    values = x.detach().double().numpy()
    channels = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
    mean, var = channels.mean(axis=1), channels.var(axis=1)
    if layer.running_mean is not None:
        mean = share * layer.running_mean.double().numpy() + (1 - share) * mean
        var = share * layer.running_var.double().numpy() + (1 - share) * var
    gamma = np.ones_like(mean) if layer.weight is None else layer.weight.detach().double().numpy()
    beta = np.zeros_like(mean) if layer.bias is None else layer.bias.detach().double().numpy()
    y = (channels - mean[:, None]) / np.sqrt(var + layer.eps)[:, None]
    y = gamma[:, None] * y + beta[:, None]
    moved = y.reshape(np.moveaxis(values, 1, 0).shape)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(moved, 0, 1)))


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_source_is_bit_identical_to_evaluation_mode(kind):
    make, shape = KINDS[kind]
    layer, x = trained(make(4)), sample(shape)
    expected = copy.deepcopy(layer).eval()(x)
    assert torch.equal(install_statistics(layer, "source")(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_test_is_bit_identical_to_training_mode(kind):
    make, shape = KINDS[kind]
    layer, x = trained(make(4)), sample(shape)
    expected = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
    assert torch.equal(install_statistics(layer, "test")(x), expected)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("statistics", "share"), [("source", 1.0), ("test", 0.0), (Mixed(), 0.8)])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_equal_a_float64_reference(kind, statistics, share, affine):
    make, shape = KINDS[kind]
    layer, x = trained(make(4, eps=1e-2, affine=affine)), sample(shape)
    expected = reference(layer, x, share)
    actual = install_statistics(layer, statistics)(x)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    share=st.floats(0, 1),
    batch=st.integers(1, 3),
    channels=st.integers(1, 3),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**31),
)
def test_mixed_equals_the_reference_at_any_share_and_shape(share, batch, channels, size, seed):
    layer = trained(nn.BatchNorm2d(channels), seed).double()
    x = sample((batch, channels, *size), seed).double()
    expected = reference(layer, x, share)  # one value a channel included: then vt is 0
    torch.testing.assert_close(install_statistics(layer, Mixed(share))(x), expected)


def test_mixed_between_its_ends_is_source_and_test():
    layer, x = trained(nn.BatchNorm2d(4)).double(), sample((2, 4, 5, 5)).double()
    outputs = {s: install_statistics(copy.deepcopy(layer), s)(x) for s in ("source", "test")}
    for share, end in ((1.0, "source"), (0.0, "test")):
        mixed = install_statistics(copy.deepcopy(layer), Mixed(share))(x)
        torch.testing.assert_close(mixed, outputs[end], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("statistics", ALL)
def test_the_training_flag_changes_nothing_and_running_statistics_stay(statistics):
    model, x = install_statistics(small_network(), statistics), sample((2, 2, 6, 6))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    in_training = model.train()(x)
    in_evaluation = model.eval()(x)
    assert torch.equal(in_training, in_evaluation)
    model(torch.full_like(x, torch.inf))  # a momentum of 0 would still write 0·∞
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("statistics", ALL)
def test_batch_of_one(statistics):
    layer, x = trained(nn.BatchNorm2d(4)), sample((1, 4, 5, 6))
    share = {"source": 1.0, "test": 0.0}.get(statistics, 0.3)
    expected = reference(layer, x, share)
    actual = install_statistics(layer, statistics)(x).double()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_half_of_an_affine_layer_and_layers_without_statistics():
    x = sample((3, 4, 5))
    without_bias = trained(nn.BatchNorm1d(4, track_running_stats=False))
    without_bias.bias = None
    expected = reference(without_bias, x, 0.0)
    actual = install_statistics(without_bias, "test")(x).double()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    tracked = trained(nn.BatchNorm1d(4))
    tracked.bias = None
    expected = reference(tracked, x, 0.6)
    actual = install_statistics(tracked, Mixed(0.6))(x).double()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ALL)
def test_first_and_second_derivatives(statistics):
    layer = install_statistics(trained(nn.BatchNorm2d(2)).double(), statistics)
    x = sample((2, 2, 2, 3)).double().requires_grad_()

    def output(x, weight, bias):
        return functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    arguments = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(output, arguments)
    assert torch.autograd.gradgradcheck(output, arguments)


def test_gradients_flow_through_the_current_share_only():
    x = sample((2, 4, 5, 5)).requires_grad_()
    layer = install_statistics(trained(nn.BatchNorm2d(4)), Mixed(0.8))
    mean, var = layer.statistics.moments(layer, x)
    (gradient,) = torch.autograd.grad(mean.sum(), x, retain_graph=True)
    torch.testing.assert_close(gradient, torch.full_like(x, 0.2 / 50))
    (gradient,) = torch.autograd.grad(var.sum(), x)
    centred = x - x.mean(dim=(0, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, 0.2 * 2 / 50 * centred)


# --- half precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ALL)
def test_bfloat16_activations_are_normalised_in_float32(statistics):
    layer = trained(nn.BatchNorm2d(4))
    x = sample((2, 4, 16, 16)).bfloat16()
    expected = reference(layer, x, {"source": 1.0, "test": 0.0}.get(statistics, 0.3))
    with torch.autocast("cpu", torch.bfloat16):
        actual = install_statistics(layer, statistics)(x)
    assert actual.dtype == torch.bfloat16
    # the result is rounded once: within one unit in the last place (8 bits) of the exact one
    torch.testing.assert_close(actual.double(), expected, rtol=2**-7, atol=2**-9)


def test_moments_of_bfloat16_are_float32_and_do_not_lose_small_terms():
    x = torch.full((1, 1, 1000), 1.0).bfloat16()
    x[..., 0] = 100.0
    mean, var = batch_moments(x)
    assert mean.dtype == var.dtype == torch.float32
    assert mean.item() == pytest.approx(1.099)
    assert var.item() == pytest.approx(99**2 * 0.001 * 0.999)


def test_source_moments_of_a_half_precision_model_are_float32():
    layer = install_statistics(trained(nn.BatchNorm2d(4)).bfloat16(), Mixed(0.5))
    assert [m.dtype for m in source_moments(layer)] == [torch.float32] * 2
    assert layer(sample((1, 4, 3, 3)).bfloat16()).dtype == torch.bfloat16


# --- the model around the layers ------------------------------------------------------------------


def test_names_parameters_and_buffers_stay_the_very_same_objects():
    model = small_network()
    state = model.state_dict(keep_vars=True)
    installed = install_statistics(model, "test")
    assert installed is model
    after = installed.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[name] is state[name] for name in state)
    adapted = [layer for layer in model.modules() if isinstance(layer, AdaptedBatchNorm)]
    assert [layer.name for layer in adapted] == ["1", "3.1"]


def test_checkpoints_go_in_and_out_of_an_adapted_model():
    source, model = small_network(), install_statistics(small_network(), "source")
    with torch.no_grad():
        for tensor in source.state_dict().values():
            tensor.add_(1)
    x = sample((2, 2, 6, 6))
    model.load_state_dict(source.state_dict())
    assert torch.equal(model(x), source.eval()(x))
    plain = small_network()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.eval()(x), source(x))


def test_tied_layers_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.BatchNorm1d(3)
            self.second = self.first
            self.blocks = nn.ModuleList([nn.Sequential(self.first), nn.Sequential(self.first)])

    model = install_statistics(Tied(), "test")
    assert isinstance(model.first, AdaptedBatchNorm)
    assert model.first is model.second is model.blocks[0][0] is model.blocks[1][0]
    assert model.first.name == "first"


def test_a_block_used_at_two_places():
    block = nn.Sequential(nn.BatchNorm1d(3))
    model = install_statistics(nn.ModuleDict({"a": block, "b": block}), "test")
    assert model["a"] is model["b"]
    assert isinstance(model["a"][0], AdaptedBatchNorm)


def test_a_model_that_is_a_batch_norm_is_returned_replaced():
    layer = nn.BatchNorm1d(3)
    adapted = install_statistics(layer, "test")
    assert isinstance(adapted, AdaptedBatchNorm)
    assert adapted.weight is layer.weight


def test_other_layers_are_left_alone():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2), nn.Dropout())
    others = list(model)[1:]
    assert list(install_statistics(model, "test"))[1:] == others


def test_installing_again_replaces_the_statistics():
    model, x = small_network(), sample((2, 2, 6, 6))
    expected = copy.deepcopy(model).eval()(x)
    model = install_statistics(install_statistics(model, "test"), "source")
    assert torch.equal(model(x), expected)
    assert model[1].predecessor_type is nn.BatchNorm2d


def test_hooks_survive():
    model, seen = small_network(), []
    handle = model[1].register_forward_hook(lambda *_: seen.append("hook"))
    model = install_statistics(model, "test")
    model(sample((1, 2, 6, 6)))
    handle.remove()
    model(sample((1, 2, 6, 6)))
    assert seen == ["hook"]


def test_input_checks_are_the_predecessors():
    model = install_statistics(nn.BatchNorm2d(4), "test")
    with pytest.raises(ValueError, match="expected 4D input"):
        model(sample((3, 4, 5)))


@pytest.mark.parametrize("statistics", ALL)
def test_functional_call_swaps_parameters_and_buffers(statistics):
    model, x = install_statistics(small_network(), statistics), sample((2, 2, 6, 6))
    replacement = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    swapped = functional_call(model, replacement, (x,))
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(replacement)
    assert torch.equal(swapped, loaded(x))
    assert not torch.equal(swapped, model(x))


@pytest.mark.parametrize("statistics", ALL)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent_and_share_one_statistics_object(statistics, clone):
    model, x = install_statistics(small_network(), statistics), sample((2, 2, 6, 6))
    twin = clone(model)
    expected = model(x)
    assert torch.equal(twin(x), expected)
    assert twin[1].statistics is twin[3][1].statistics
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    assert torch.equal(twin(x), expected)


# --- statistics of one's own ----------------------------------------------------------------------


class Median(Statistics):
    """MedBN: the median, and the mean squared deviation from it."""

    def moments(self, layer, x):
        flat = x.transpose(0, 1).flatten(1)
        median = flat.median(dim=1).values
        return median, (flat - median[:, None]).square().mean(dim=1)


class DecayingAverage(Statistics):
    """A stateful choice in the manner of DUA: a momentum that decays with every image."""

    uses_source = True

    def __init__(self):
        self.reset()

    def reset(self):
        self.kept = {}

    def moments(self, layer, x):
        mean, var, count = self.kept.get(layer.name, (*source_moments(layer), 0))
        momentum = 0.1 * 0.94 ** (count + 1) + 0.005
        with torch.no_grad():
            new_mean, new_var = batch_moments(x)
            mean, var = mean.lerp(new_mean, momentum), var.lerp(new_var, momentum)
        self.kept[layer.name] = (mean, var, count + 1)
        return mean, var

    def state_dict(self):
        return {"kept": dict(self.kept)}

    def load_state_dict(self, state_dict):
        self.kept = dict(state_dict["kept"])


def test_statistics_that_only_define_moments():
    x = torch.tensor([[[0.0, 0.0, 1.0, 2.0, 100.0]]])
    layer = install_statistics(nn.BatchNorm1d(1, eps=0.0), Median())
    expected = (x - 1) / torch.sqrt(torch.tensor((1 + 1 + 0 + 1 + 99**2) / 5))
    torch.testing.assert_close(layer(x), expected)


def test_stateful_statistics_tell_layers_apart_and_can_be_saved_reset_and_loaded():
    statistics = DecayingAverage()
    model = install_statistics(small_network(), statistics)
    images = [sample((1, 2, 6, 6), seed) for seed in range(3)]
    first = model(images[0])
    buffer = io.BytesIO()
    torch.save(statistics.state_dict(), buffer)
    second = model(images[1])
    assert sorted(statistics.kept) == ["1", "3.1"]
    assert statistics.kept["1"][2] == 2

    statistics.reset()
    assert torch.equal(model(images[0]), first)
    model(images[2])
    buffer.seek(0)
    statistics.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(model(images[1]), second)


def test_statistics_that_are_a_module_leave_the_state_dict_alone():
    class Learned(nn.Module, Statistics):
        def __init__(self):
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(3))

        def moments(self, layer, x):
            return self.mean, torch.ones(3)

    layer = nn.BatchNorm1d(3)
    names = list(layer.state_dict())
    adapted = install_statistics(layer, Learned())
    assert list(adapted.state_dict()) == names
    adapted(sample((2, 3))).sum().backward()
    assert adapted.statistics.mean.grad is not None


def test_stateless_statistics_have_no_state():
    statistics = Mixed(0.5)
    assert statistics.state_dict() == {}
    statistics.load_state_dict({})
    statistics.reset()
    with pytest.raises(ValueError, match=r"keeps no state.*kept"):
        statistics.load_state_dict({"kept": 1})


# --- errors ---------------------------------------------------------------------------------------


def test_resolving():
    assert resolve_statistics("source") == SourceStatistics()
    assert resolve_statistics("test") == BatchStatistics()
    own = Median()
    assert resolve_statistics(own) is own
    with pytest.raises(ValueError, match=r"Mixed\(0\.8\), but are 'train'"):
        resolve_statistics("train")


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_a_share(share):
    with pytest.raises(ValueError, match="share"):
        Mixed(share)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (0, 4, 3, 3)])
def test_a_single_value_a_channel_has_no_variance(shape):
    model = install_statistics(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), "test")
    with pytest.raises(ValueError, match=r"'1'.*at least 2 values a channel"):
        model(torch.ones(shape))


def test_no_running_statistics_to_take():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    layers = list(model)
    with pytest.raises(ValueError, match=r"'1'.*no running statistics"):
        install_statistics(model, Mixed(0.5))
    assert list(model) == layers  # nothing was replaced


def test_the_source_of_a_layer_without_running_statistics_is_evaluation_mode():
    layer, x = trained(nn.BatchNorm1d(4, track_running_stats=False)), sample((6, 4))
    expected = copy.deepcopy(layer).eval()(x)
    assert torch.equal(install_statistics(layer, "source")(x), expected)


def test_a_model_without_batch_norm():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert install_statistics(model, "source") is model
    for statistics in ("test", Mixed(0.5), Median()):
        with pytest.raises(ValueError, match=r"Sequential has no BatchNorm.*or another method"):
            install_statistics(model, statistics)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_are_refused():
    with pytest.raises(ValueError, match=r"'0'.*lazy"):
        install_statistics(nn.Sequential(nn.LazyBatchNorm2d()), "test")


def test_abstract_statistics_say_what_is_missing():
    layer = install_statistics(nn.BatchNorm1d(2), Statistics())
    with pytest.raises(NotImplementedError, match="moments"):
        layer(sample((3, 2)))


# --- parts ----------------------------------------------------------------------------------------


def test_normalise_with_given_statistics_and_no_affine_part():
    x = sample((2, 3, 4)).double()
    mean, var = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([4.0, 9.0, 16.0]).double()
    expected = torch.stack([(x[:, c] - (c + 1)) / (c + 2) for c in range(3)], dim=1)
    torch.testing.assert_close(normalise_with(x, mean, var, eps=0.0), expected)


def test_affine_parameters_of_all_norms_once_each():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)
            self.batch = nn.BatchNorm2d(2)
            self.again = self.batch
            self.instance = nn.InstanceNorm2d(2, affine=True)
            self.group = nn.GroupNorm(1, 2)
            self.layer = nn.LayerNorm(4, bias=False)
            self.rms = nn.RMSNorm(4)
            self.plain = nn.BatchNorm2d(2, affine=False)
            self.tied = nn.BatchNorm2d(2)
            self.tied.weight = self.group.weight
            self.positive = nn.GroupNorm(1, 2)
            parametrize.register_parametrization(self.positive, "weight", nn.Softplus())

    model = Model()
    expected = [
        "batch.weight",
        "batch.bias",
        "instance.weight",
        "instance.bias",
        "group.weight",
        "group.bias",
        "layer.weight",
        "rms.weight",
        "tied.bias",
        "positive.bias",
        "positive.parametrizations.weight.original",
    ]
    found = norm_affine_parameters(model)
    assert list(found) == expected
    assert all(found[name] is model.get_parameter(name) for name in expected)
    assert list(norm_affine_parameters(install_statistics(model, "test"))) == expected
    assert norm_affine_parameters(nn.Linear(2, 2)) == {}
