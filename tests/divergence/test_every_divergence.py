"""Every f-divergence: its functions, and divergences of classes, Gaussians and critics."""

import math

import pytest
import torch
from helpers import as_users_run_it, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from scipy.spatial import distance
from torch import Tensor

import gradkit as gk
from gradkit.divergence.kullback_leibler import log_wright_omega
from gradkit.divergence.named import DIVERGENCES

LN2 = math.log(2)
# f(u), straight from its definition.
DEFINED = {
    "kl": lambda u: u * u.log(),
    "reverse_kl": lambda u: -u.log(),
    "js": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "gan": lambda u: u * u.log() - (u + 1) * (u + 1).log(),
    "hellinger": lambda u: (u.sqrt() - 1) ** 2,
    "pearson": lambda u: (u - 1) ** 2,
    "neyman": lambda u: (1 - u) ** 2 / u,
    "tv": lambda u: (u - 1).abs() / 2,
    "jeffreys": lambda u: (u - 1) * u.log(),
}
CASES: dict[str, tuple[str, dict[str, float]]] = {name: (name, {}) for name in DEFINED}
for number in (-1.5, 0.3, 0.5, 0.9, 1.5, 3.0):
    CASES[f"alpha {number}"] = ("alpha", {"alpha": number})
    DEFINED[f"alpha {number}"] = lambda u, a=number: (u**a - 1 - a * (u - 1)) / (a * (a - 1))
# Of which powers overflow first.
EVERY = {**CASES, "alpha 7": ("alpha", {"alpha": 7.0}), "alpha -6": ("alpha", {"alpha": -6.0})}
SMOOTH = [case for case in CASES if case != "tv"]
CLOSED = [case for case in CASES if case not in ("js", "gan", "tv")]


def make(case: str, **options) -> gk.divergence.FDivergence:
    name, arguments = EVERY[case]
    return gk.f_divergence(name, **arguments, **options)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def direct(case: str, p: Tensor, q: Tensor) -> Tensor:
    """Σ q·f(p/q), where no probability is 0."""
    return (q * DEFINED[case](p / q)).sum(-1)


def random_logs(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    noise = torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
    return (scale * noise).log_softmax(-1)


P3, Q3 = numbers(0.7, 0.2, 0.1), numbers(0.5, 0.3, 0.2)
P2, Q2 = numbers(0.5, 0.5), numbers(0.25, 0.75)
KNOWN = [
    ("kl", {}, P3, Q3, 0.085123),
    ("kl", {}, Q3, P3, 0.092033),
    ("reverse_kl", {}, P3, Q3, 0.092033),
    ("js", {}, P3, Q3, 0.043802),
    ("gan", {}, P3, Q3, 0.043802 - 2 * LN2),
    ("hellinger", {}, P3, Q3, 0.044043),
    ("pearson", {}, P3, Q3, 0.163333),
    ("pearson", {}, Q3, P3, 0.207143),
    ("neyman", {}, P3, Q3, 0.207143),
    ("neyman", {}, Q3, P3, 0.163333),
    ("tv", {}, P3, Q3, 0.2),
    ("jeffreys", {}, P3, Q3, 0.177156),
    ("alpha", {"alpha": 1.5}, P3, Q3, 0.083015),
    ("alpha", {"alpha": 1.5}, Q3, P3, 0.097124),
    ("kl", {}, P2, Q2, 0.143841),
    ("reverse_kl", {}, P2, Q2, 0.130812),
    ("js", {}, P2, Q2, 2 * 0.033822),
    ("hellinger", {}, P2, Q2, 0.068148),
    ("pearson", {}, P2, Q2, 1 / 3),
    ("neyman", {}, P2, Q2, 1 / 4),
    ("tv", {}, P2, Q2, 1 / 4),
]


@pytest.mark.parametrize(("name", "arguments", "p", "q", "value"), KNOWN)
def test_known_values(name, arguments, p, q, value):
    found = gk.f_divergence(name, **arguments).between(p.log(), q.log())
    assert float(found) == pytest.approx(value, abs=1.1e-6)


@pytest.mark.parametrize("case", CASES)
def test_between_is_the_sum_of_its_definition(case):
    log_p, log_q = random_logs(0, 7, 5), random_logs(1, 7, 5)
    expected = direct(case, log_p.exp(), log_q.exp())
    torch.testing.assert_close(make(case).between(log_p, log_q), expected, rtol=1e-10, atol=1e-12)


def test_other_implementations_agree():
    log_p, log_q = random_logs(2, 6, 4), random_logs(3, 6, 4)
    p, q = (torch.distributions.Categorical(logits=each) for each in (log_p, log_q))
    kl = torch.distributions.kl_divergence
    divergence = gk.f_divergence
    torch.testing.assert_close(divergence("kl").between(log_p, log_q), kl(p, q))
    torch.testing.assert_close(divergence("reverse_kl").between(log_p, log_q), kl(q, p))
    torch.testing.assert_close(divergence("jeffreys").between(log_p, log_q), kl(p, q) + kl(q, p))
    roots = distance.jensenshannon(log_p.exp().numpy(), log_q.exp().numpy(), axis=-1)
    torch.testing.assert_close(
        divergence("js").between(log_p, log_q), 2 * torch.as_tensor(roots) ** 2
    )


def test_limits_of_alpha():
    log_p, log_q = random_logs(4, 5), random_logs(5, 5)

    def alpha(value):
        return gk.f_divergence("alpha", alpha=value).between(log_p, log_q)

    def other(name):
        return gk.f_divergence(name).between(log_p, log_q)

    for found, expected in (
        (alpha(1 + 1e-9), other("kl")),
        (alpha(1e-9), other("reverse_kl")),
        (alpha(2), other("pearson") / 2),
        (alpha(-1), other("neyman") / 2),
        (alpha(0.5), 2 * other("hellinger")),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


# The table of functions.


@pytest.mark.parametrize("case", CASES)
def test_generator_and_derivative(case):
    u = torch.logspace(-3, 3, 40, dtype=torch.float64, requires_grad=True)
    f = make(case)
    torch.testing.assert_close(f.generator(u), DEFINED[case](u), rtol=1e-9, atol=1e-12)
    (slope,) = torch.autograd.grad(DEFINED[case](u).sum(), u)
    torch.testing.assert_close(f.derivative(u), slope, rtol=1e-7, atol=1e-9)
    assert float(f.generator(numbers(1.0))) == pytest.approx(f.offset, abs=1e-15)


@pytest.mark.parametrize("case", SMOOTH)
def test_the_curvature_at_one(case):
    one = numbers(1.0).requires_grad_()
    (slope,) = torch.autograd.grad(DEFINED[case](one).sum(), one, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, one)
    f = make(case)
    assert f.curvature == pytest.approx(curvature.item(), rel=1e-9)
    # Near P = Q, float32: relative accuracy although the divergence is 1e-7.
    q = torch.tensor([0.2, 0.3, 0.5])
    p = q + torch.tensor([1e-4, -2e-4, 1e-4])
    expected = f.curvature / 2 * (p - q).square().div(q).sum()
    found = f.between(p.log(), q.log()) - f.offset
    if case != "gan":  # whose offset hides it
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


positive = st.floats(0.01, 100)


@settings(max_examples=60, deadline=None)
@given(u=positive, other=positive, case=st.sampled_from([*CASES]))
def test_conjugate_and_derivative(u, other, case):
    """f*(f'(u)) = u·f'(u) − f(u), and f*(t) ≥ u·t − f(u) elsewhere: f* is the conjugate."""
    f, u, other = make(case), numbers(u), numbers(other)
    t = f.derivative(u)
    torch.testing.assert_close(f.conjugate(t), u * t - f.generator(u), rtol=1e-7, atol=1e-7)
    slack = f.conjugate(t) - (other * t - f.generator(other))
    assert float(slack) >= -1e-7 * (1 + float(other * t.abs()))


@pytest.mark.parametrize(
    ("case", "outside", "below"),
    [
        ("reverse_kl", 0.1, None),
        ("js", LN2 + 0.1, None),
        ("gan", 0.1, None),
        ("hellinger", 1.1, None),
        ("neyman", 1.1, None),
        ("tv", 0.6, (-0.7, -0.5)),
        ("pearson", None, (-3.0, -1.0)),
        ("alpha 0.5", 2.1, None),
        ("alpha -1.5", 0.41, None),
        ("alpha 1.5", None, (-2.5, -1 / 1.5)),
    ],
)
def test_where_the_conjugate_ends(case, outside, below):
    f = make(case)
    if outside is not None:
        t = numbers(outside, outside - 0.2).requires_grad_()
        values = f.conjugate(t)
        assert values[0] == math.inf
        assert values[1].isfinite()
        assert torch.autograd.grad(values[1], t)[0].isfinite().all()
    if below is not None:
        assert float(f.conjugate(numbers(below[0]))) == pytest.approx(below[1])


@pytest.mark.parametrize("case", CASES)
def test_activations_lead_into_the_domain(case):
    v = torch.linspace(-8, 8, 33, dtype=torch.float64)
    f = make(case)
    assert f.conjugate(f.activation(v)).isfinite().all()
    assert (f.activation(v).diff() > 0).all()
    # The critic is the activation's inverse of f'(u).
    if case != "tv":
        for log_ratio in (-1.5, 0.0, 1.0):
            ratio = numbers(log_ratio).exp()
            found = f.activation(numbers(f.critic(log_ratio)))
            torch.testing.assert_close(found, f.derivative(ratio), rtol=1e-9, atol=1e-12)


def test_wright_omega_is_scipys():
    z = torch.linspace(-60, 60, 241, dtype=torch.float64, requires_grad=True)
    y = log_wright_omega(z)
    omega = torch.as_tensor(special.wrightomega(z.detach().numpy()))
    torch.testing.assert_close(y.exp(), omega, rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(y.sum(), z)
    torch.testing.assert_close(slope, 1 / (1 + omega), rtol=1e-9, atol=1e-12)


# Gradients, and the ends of the range.


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_between(case):
    """∂D/∂p = f'(u) and ∂D/∂q = −f*(f'(u)), up to a constant on the simplex."""
    f = make(case)
    logits = [random_logs(seed, 5).requires_grad_() for seed in (6, 7)]
    value = f.between(*(each.log_softmax(-1) for each in logits))
    p, q = (each.detach().softmax(-1) for each in logits)
    slope = f.derivative(p / q)
    along_p, along_q = p * slope, -q * f.conjugate(slope)
    expected = [along_p - p * along_p.sum(), along_q - q * along_q.sum()]
    for found, wanted in zip(torch.autograd.grad(value, logits), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    f = make(case)

    def twice(x, y):
        return f.between(x.log_softmax(-1), y.log_softmax(-1))

    inputs = [random_logs(seed, 2, 3, scale=1.0).requires_grad_() for seed in (8, 9)]
    assert torch.autograd.gradcheck(twice, inputs)
    assert torch.autograd.gradgradcheck(twice, inputs)

    def labels(x, y):
        logs = (torch.nn.functional.logsigmoid(each) for each in (x, y))
        return f.between(*logs, multi_label=True)

    assert torch.autograd.gradcheck(labels, inputs)


EXTREMES = {
    "one-hot against the other": ([0.0, -math.inf], [-math.inf, 0.0]),
    "one-hot against even": ([0.0, -math.inf], [-LN2, -LN2]),
    "even against one-hot": ([-LN2, -LN2], [0.0, -math.inf]),
    "one-hot twice": ([0.0, -math.inf], [0.0, -math.inf]),
    "far": ([0.0, -1e4], [-1e4, 0.0]),
    "far on one side": ([-1e4, 0.0], [-1e-4, -9.21]),
}


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("case", EVERY)
def test_finite_where_probabilities_are_0(case, extreme, multi_label):
    f = make(case)
    logits = [torch.tensor(each, requires_grad=True) for each in EXTREMES[extreme]]
    value = f.between(*logits, multi_label=multi_label)
    assert value.isfinite()
    assert value >= f.offset - 1e-6
    if extreme == "one-hot twice":
        assert value.item() == pytest.approx(f.offset, abs=1e-6)
    for gradient in torch.autograd.grad(value, logits):
        assert gradient.isfinite().all()


def test_values_and_gradients_at_the_bound():
    log_p, log_q = torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0])
    assert float(gk.f_divergence("js").between(log_p, log_q)) == pytest.approx(2 * LN2)
    assert float(gk.f_divergence("hellinger").between(log_p, log_q)) == pytest.approx(2)
    assert float(gk.f_divergence("tv").between(log_p, log_q)) == pytest.approx(1)
    assert float(gk.f_divergence("kl").between(log_p, log_q)) == pytest.approx(30)
    # A clamp would leave a wrong, certain model without a gradient.
    logits = torch.tensor([-1e4, 0.0], requires_grad=True)
    gk.f_divergence("kl").between(log_p, logits.log_softmax(-1)).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    log_p, log_q = (random_logs(seed, 6).to(dtype) for seed in (10, 11))
    f = gk.f_divergence("js")
    expected = f.between(log_p.float(), log_q.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = f.between(log_p, log_q)
        bound = f.variational(log_p, log_q)
    assert found.dtype == bound.dtype == torch.float32
    assert torch.equal(found, expected)


# What torch's own forward mode calls.
@pytest.mark.filterwarnings(r"ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning")
def test_vmap_and_forward_mode():
    f = gk.f_divergence("js")
    log_p, log_q = random_logs(12, 4, 3), random_logs(13, 4, 3)
    log_p[0, 0] = -math.inf
    torch.testing.assert_close(torch.vmap(f.between)(log_p, log_q), f.between(log_p, log_q))
    jacobian = torch.func.jacrev(f.between)(log_p[1], log_q[1])
    torch.testing.assert_close(torch.func.jacfwd(f.between)(log_p[1], log_q[1]), jacobian)
    slopes = torch.vmap(torch.func.grad(f.between))(log_p, log_q)
    torch.testing.assert_close(slopes[1], jacobian)


# Channels that do not exclude each other.


@pytest.mark.parametrize("case", CASES)
def test_multi_label_is_the_mean_over_channels(case):
    x, y = torch.randn(2, 5, 3, generator=seeded(14), dtype=torch.float64)
    logs = [torch.nn.functional.logsigmoid(each) for each in (x, y)]
    p, q = (torch.stack((each.sigmoid(), (-each).sigmoid()), -1) for each in (x, y))
    expected = direct(case, p, q).mean(-1)
    found = make(case).between(*logs, multi_label=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_multi_label_is_accurate_at_both_ends():
    for logit in (-20.0, 20.0):
        x, y = (torch.tensor([logit, logit + 1]).double()[k : k + 1] for k in (0, 1))
        p, q = (torch.stack((each.sigmoid(), (-each).sigmoid()), -1) for each in (x, y))
        expected = direct("kl", p, q).mean(-1)
        logs = (torch.nn.functional.logsigmoid(each) for each in (x, y))
        found = gk.f_divergence("kl").between(*logs, multi_label=True)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


# Gaussians.


def quadrature(case: str, mean_p: float, sd_p: float, mean_q: float, sd_q: float) -> float:
    """∫ q·f(p/q), by the trapezoidal rule."""
    x = torch.linspace(-30, 30, 8001, dtype=torch.float64)
    p, q = (
        torch.distributions.Normal(mean, sd).log_prob(x)
        for mean, sd in ((mean_p, sd_p), (mean_q, sd_q))
    )
    return float(torch.trapezoid(q.exp() * DEFINED[case]((p - q).exp()), x))


@pytest.mark.parametrize(
    ("case", "value"),
    [
        ("kl", 0.5),
        ("reverse_kl", 0.5),
        ("jeffreys", 1.0),
        ("pearson", math.e - 1),
        ("neyman", math.e - 1),
        ("hellinger", 0.235006),
        ("tv", 0.382925),
        ("js", 0.222843),
    ],
)
def test_known_gaussians(case, value):
    assert quadrature(case, 0.0, 1.0, 1.0, 1.0) == pytest.approx(value, abs=2e-6)
    if case in CLOSED:
        found = make(case).between_gaussians(*map(numbers, (0.0, 1.0, 1.0, 1.0)))
        assert float(found) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("case", CLOSED)
def test_gaussians_of_other_variances(case):
    # Variances whose ratio keeps every integral finite.
    found = make(case).between_gaussians(*map(numbers, (0.3, 1.05**2, -0.4, 1.0)))
    expected = quadrature(case, 0.3, 1.05, -0.4, 1.0)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_gaussians_in_several_dimensions():
    generator = seeded(15)
    mean_p, mean_q = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64) / 2
    var_p, var_q = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64) / 4 + 1
    p, q = (
        torch.distributions.Independent(torch.distributions.Normal(mean, var.sqrt()), 1)
        for mean, var in ((mean_p, var_p), (mean_q, var_q))
    )
    found = gk.f_divergence("kl").between_gaussians(mean_p, var_p, mean_q, var_q)
    torch.testing.assert_close(found, torch.distributions.kl_divergence(p, q))
    # 1 + D factorises over dimensions where D is an integral of powers.
    for case, scale in (("pearson", 1.0), ("neyman", 1.0), ("hellinger", -0.5)):
        f = make(case)
        joint = 1 + scale * f.between_gaussians(mean_p, var_p, mean_q, var_q)
        each = f.between_gaussians(*(t[..., None] for t in (mean_p, var_p, mean_q, var_q)))
        torch.testing.assert_close(joint, (1 + scale * each).prod(-1))


@pytest.mark.parametrize("case", CLOSED)
def test_gradients_between_gaussians(case):
    f = make(case)
    values = [numbers(0.2, -0.5), numbers(1.2, 0.9), numbers(-0.1, 0.4), numbers(1.0, 1.1)]
    assert torch.autograd.gradcheck(f.between_gaussians, [v.requires_grad_() for v in values])
    same = f.between_gaussians(values[0], values[1], values[0], values[1])
    assert same.item() == 0
    far = [v.float().requires_grad_() for v in (numbers(0.0), numbers(1.0), numbers(1e3))]
    value = f.between_gaussians(far[0], far[1], far[2], far[1])
    assert value.isfinite()
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(value, far))


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jeffreys"])
@pytest.mark.parametrize("ratio", [1e-12, 3e-8, 1e-7, 1e-3, 0.4, 0.6, 1.6, 1e3, 1e7])
def test_gaussians_of_variances_that_differ_by_orders_of_magnitude(name, ratio):
    """In float32, as those of a unit that is dead in one domain; by the formula in float64."""
    mean_p, mean_q, var_q = 0.5, -1.0, 250.0
    var_p = float(torch.tensor(ratio * var_q))  # as float32 has it

    def kullback_leibler(mean, var, other_mean, other_var):
        excess = var / other_var - 1 + (mean - other_mean) ** 2 / other_var
        return (excess - torch.log(var / other_var)) / 2

    def expected(*given):
        forward, back = kullback_leibler(*given), kullback_leibler(*given[2:], *given[:2])
        return {"kl": forward, "reverse_kl": back, "jeffreys": forward + back}[name]

    numbers = (mean_p, var_p, mean_q, var_q)
    given = [torch.tensor(value, requires_grad=True) for value in numbers]
    wide = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in numbers]
    found = gk.f_divergence(name).between_gaussians(*(each[None] for each in given))
    torch.testing.assert_close(found.double(), expected(*wide), rtol=2e-6, atol=0)
    slopes = torch.autograd.grad(found, given)
    for own, reference in zip(slopes, torch.autograd.grad(expected(*wide), wide), strict=True):
        torch.testing.assert_close(own.double(), reference, rtol=2e-5, atol=1e-9)


def test_gaussians_with_tails_that_are_too_heavy():
    heavy = gk.f_divergence("pearson").between_gaussians(*map(numbers, (0.0, 2.5, 0.0, 1.0)))
    assert heavy == math.inf
    assert gk.f_divergence("neyman").between_gaussians(*map(numbers, (0, 2.5, 0, 1.0))) < 10


@pytest.mark.parametrize("case", ["js", "gan", "tv"])
def test_gaussians_without_a_closed_form(case):
    with pytest.raises(ValueError, match=f"'{case}' has no closed form .*; choose one of kl, "):
        make(case).between_gaussians(*map(numbers, (0.0, 1.0, 1.0, 1.0)))


# The variational bound.


def samples(log_p: Tensor, log_q: Tensor, v: Tensor, count: int = 64) -> tuple[Tensor, Tensor]:
    """The critic's outputs, one for each class, repeated in proportion to p and to q."""
    return tuple(
        torch.repeat_interleave(v, (each.exp() * count).round().long()) for each in (log_p, log_q)
    )


P4, Q4 = numbers(16, 32, 8, 8) / 64, numbers(32, 8, 8, 16) / 64


@pytest.mark.parametrize("case", CASES)
def test_the_bound_is_tight_for_the_best_critic(case):
    f = make(case)
    log_ratio = (P4 / Q4).log()
    best = numbers(*(min(max(f.critic(float(each)), -40.0), 40.0) for each in log_ratio))
    found = f.variational(*samples(P4.log(), Q4.log(), best))
    torch.testing.assert_close(found, direct(case, P4, Q4), rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    v=st.lists(st.floats(-5, 5), min_size=4, max_size=4),
    case=st.sampled_from([*CASES]),
)
def test_other_critics_give_less(v, case):
    found = make(case).variational(*samples(P4.log(), Q4.log(), numbers(*v)))
    assert float(found) <= float(direct(case, P4, Q4)) + 1e-9


@pytest.mark.parametrize("case", CASES)
def test_the_bound_is_that_of_activation_and_conjugate(case):
    f = make(case)
    v = torch.linspace(-3, 3, 13, dtype=torch.float64)
    if case != "tv":
        v = numbers(*(f.critic(float(log_ratio)) for log_ratio in v))
    expected = f.activation(v).mean() - f.conjugate(f.activation(v)).mean()
    torch.testing.assert_close(f.variational(v, v), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_critic_far_out_is_bounded_and_led_back(case):
    v = torch.tensor([-1e4, 1e4], requires_grad=True)
    value = make(case).variational(v, v)
    assert value.isfinite()
    (slope,) = torch.autograd.grad(value, v)
    assert slope.isfinite().all()
    if case in ("kl", "jeffreys"):  # far too large for Q, where the bound falls
        assert slope[1] < 0


# Normalisation and arguments.


@pytest.mark.parametrize("case", SMOOTH)
def test_normalised_divergences_agree_near_equality(case):
    f, plain = make(case, normalize=True), make(case)
    q = numbers(0.2, 0.3, 0.5)
    p = q + numbers(1e-5, -2e-5, 1e-5)
    found = f.between(p.log(), q.log()) - f.offset
    torch.testing.assert_close(
        found, (p - q).square().div(q).sum() / 2, rtol=1e-3, atol=1e-14 if case == "gan" else 0
    )
    log_p, log_q = random_logs(16, 4), random_logs(17, 4)
    scale = plain.curvature
    torch.testing.assert_close(f.between(log_p, log_q), plain.between(log_p, log_q) / scale)
    u = numbers(0.4, 1.0, 1.7)
    torch.testing.assert_close(f.generator(u), plain.generator(u) / scale)
    t = f.derivative(u)
    torch.testing.assert_close(f.conjugate(t), u * t - f.generator(u))
    v = numbers(plain.critic(-1.0), plain.critic(0.5))
    expected = f.activation(v).mean() - f.conjugate(f.activation(v)).mean()
    torch.testing.assert_close(f.variational(v, v), expected)
    if case in CLOSED:
        given = [numbers(0.1), numbers(1.0), numbers(0.4), numbers(1.1)]
        expected = plain.between_gaussians(*given) / scale
        torch.testing.assert_close(f.between_gaussians(*given), expected)


def test_arguments():
    with pytest.raises(ValueError, match="normalize divides by f''\\(1\\), which 'tv' does not"):
        gk.f_divergence("tv", normalize=True)
    with pytest.raises(ValueError, match="no divergence 'jsd'; choose one of kl, reverse_kl, js"):
        gk.f_divergence("jsd")
    with pytest.raises(TypeError, match="'kl' has no argument 'alpha'; it takes normalize"):
        gk.f_divergence("kl", alpha=2.0)
    for alpha, name in ((1, "kl"), (0.0, "reverse_kl")):
        with pytest.raises(ValueError, match=rf"alpha is {alpha:g}, .*f_divergence\('{name}'\)"):
            gk.f_divergence("alpha", alpha=alpha)
    with as_users_run_it():
        for alpha, error in (("2", TypeError), (math.nan, ValueError), (math.inf, ValueError)):
            with pytest.raises(error, match="alpha is "):
                gk.f_divergence("alpha", alpha=alpha)
        f = gk.f_divergence("kl")
        with pytest.raises(ValueError, match=r"log_p has shape \(3,\) and log_q \(2,\)"):
            f.between(torch.zeros(3), torch.zeros(2))
        one, two = torch.ones(1), torch.ones(2)
        with pytest.raises(ValueError, match=r"the shapes \(1,\), \(2,\), \(1,\), \(1,\)"):
            f.between_gaussians(one, two, one, one)


def test_every_name_is_tested():
    assert {name for name, _ in CASES.values()} == DIVERGENCES.keys()
