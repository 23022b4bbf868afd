"""What code that hangs on parameters, layers and trainers finds with a bare optimizer, it finds."""

import concurrent.futures
import copy
import functools
import io
import warnings

import pytest
import torch
from torch import nn

import gradkit as gk

ENGINES = ["auto", "inplace", "functional"]
IN_PLACE = ["auto", "inplace"]
CHAINS = {"none": (), "sam": (gk.SAM,)}


class Gain(nn.Module):
    """An equalised learning rate, whose factor is an attribute of the parameter."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.w.gain = 0.1

    def forward(self, x):
        return x @ (self.w * self.w.gain)


class Typed(nn.Parameter):
    pass


class MaxNorm(nn.Linear):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(x)


class Clamped(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.3, 0.3)
        return super().forward(x)


class ClampedData(nn.Linear):
    def forward(self, x):
        self.weight.data.clamp_(-0.3, 0.3)
        return super().forward(x)


def make(kind=nn.Linear, inputs=4, outputs=2):
    torch.manual_seed(0)
    return kind(inputs, outputs).double()


def data(count=8, inputs=4, outputs=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    return x, 3 * torch.randn(count, outputs, generator=generator, dtype=torch.float64)


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


# What hangs on a parameter object.


@pytest.mark.parametrize("engine", IN_PLACE)
def test_closures_find_attributes_classes_and_identity(engine):
    gain, typed = Gain(), nn.Module()
    typed.p = Typed(torch.ones(3))
    x = torch.ones(1, 3)
    anchor = {p: torch.zeros(3) for p in gain.parameters()}
    for model, loss, expected in (
        (gain, lambda: gain(x).sum(), 0.3),
        (typed, lambda: typed.p.sum() * (2 if isinstance(typed.p, Typed) else 1), 6.0),
        (gain, lambda: sum(p.square().sum() for p in gain.parameters() if p in anchor), None),
    ):
        before = copy.deepcopy(model.state_dict())
        optimizer = gk.wrap(sgd(model), gk.SAM(), model=model, engine=engine)
        found = optimizer.step(loss).item()
        assert found == pytest.approx(
            sum(before["w"] ** 2).item() if expected is None else expected
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.weight, "gain", 0.1), "attribute 'gain' of the parameter 'weight'"),
        (lambda m: setattr(m, "weight", Typed(m.weight.detach())), "'weight' is a Typed"),
        (
            lambda m: m.register_buffer("start", m.weight.data),
            "'start' shares memory with the param",
        ),
        (
            lambda m: m.register_buffer("part", m.weight.data[:1]),
            "'part' shares memory with the param",
        ),
        (
            lambda m: (
                m.register_buffer("all", torch.zeros(4)),
                m.register_buffer("head", m.all[:2]),
            ),
            "'head' shares memory with the buffer all",
        ),
        (lambda m: m.weight.register_hook(lambda grad: grad), "would not run the hooks"),
    ],
)
def test_the_functional_engine_refuses_what_it_cannot_carry(change, message):
    model = make()
    change(model)
    with pytest.raises(ValueError, match=f"functional.*{message}.*engine='inplace'"):
        gk.wrap(sgd(model), model=model, engine="functional")
    optimizer = gk.wrap(sgd(model), model=model)  # the default takes it
    x, y = data()
    before = model.weight.detach().clone()
    optimizer.step(lambda: (model(x) - y).square().mean())
    assert not torch.equal(before, model.weight)


@pytest.mark.parametrize("kind", [MaxNorm, Clamped, ClampedData])
@pytest.mark.parametrize("engine", ENGINES)
def test_layers_that_write_their_weights_train_as_with_the_bare_optimizer(kind, engine):
    x, y = data()
    bare, ours = make(kind), make(kind)
    base = sgd(bare)
    optimizer = gk.wrap(sgd(ours), model=ours, engine=engine)
    for _ in range(5):
        base.zero_grad()
        (bare(x) - y).square().mean().backward()
        base.step()
        before = copy.deepcopy(ours.state_dict())
        if engine == "functional" and kind is MaxNorm:
            with pytest.raises(RuntimeError, match=r"another \.data.*engine='inplace'"):
                optimizer.step(lambda: (ours(x) - y).square().mean())
            assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())
            return
        optimizer.step(lambda: (ours(x) - y).square().mean())
    assert torch.equal(bare.weight, ours.weight)


@pytest.mark.parametrize("kind", [MaxNorm, Clamped, ClampedData])
@pytest.mark.parametrize("engine", IN_PLACE)
def test_what_layers_write_at_displaced_weights_is_put_back(kind, engine):
    """The written weights are where SAM starts from."""
    x, y = data()
    ours, expected = make(kind), make(kind)
    optimizer = gk.wrap(sgd(ours), gk.SAM(rho=0.5), model=ours, engine=engine)
    loss = lambda model: (model(x) - y).square().mean()  # noqa: E731
    for _ in range(3):
        optimizer.step(lambda: loss(ours))
        grads = torch.autograd.grad(loss(expected), list(expected.parameters()))
        here = [p.detach().clone() for p in expected.parameters()]
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        with torch.no_grad():
            for p, g in zip(expected.parameters(), grads, strict=True):
                p.add_(0.5 * g / norm)
        grads = torch.autograd.grad(loss(expected), list(expected.parameters()))
        with torch.no_grad():
            for p, h, g in zip(expected.parameters(), here, grads, strict=True):
                p.copy_(h - 0.1 * g)
        torch.testing.assert_close(ours.weight, expected.weight)


# Freezing and thawing while closures run.


@pytest.mark.parametrize("thaws", [False, True])
@pytest.mark.parametrize("own_backward", [False, True])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("chain", CHAINS)
def test_freezing_and_thawing_in_a_closure(thaws, own_backward, everything, chain):
    x, y = data()

    def run(wrapped):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
        target = model if everything else model[0]
        target.requires_grad_(not thaws)
        base = sgd(model, momentum=0.9)
        transforms = tuple(each() for each in CHAINS[chain])
        optimizer = gk.wrap(base, *transforms, model=model) if wrapped else base
        calls, moved = [0], []

        def closure():
            calls[0] += 1
            if calls[0] == 1 + len(transforms) + 1:
                target.requires_grad_(thaws)
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            if (own_backward or not wrapped) and loss.requires_grad:
                loss.backward()
            return loss.detach() if own_backward and not loss.requires_grad else loss

        for _ in range(4):
            before = [p.detach().clone() for p in model.parameters()]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "step\\(\\) had nothing to step on")
                optimizer.step(closure)
            moved.append(
                [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
            )
        return moved, model

    (bare_moved, bare), (moved, ours) = run(False), run(True)
    if chain == "none":
        assert moved == bare_moved
        for a, b in zip(bare.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    else:  # SAM calls twice where there is a gradient
        first = [flags[0] for flags in moved]
        assert first == sorted(first, reverse=not thaws)
        assert True in first
        assert False in first


@pytest.mark.parametrize(
    "change", [lambda m: m[0].requires_grad_(False), lambda m: m[1].requires_grad_(True)]
)
def test_the_functional_engine_says_that_it_cannot_freeze_or_thaw(change):
    x, _ = data()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    model[1].requires_grad_(False)
    optimizer = gk.wrap(sgd(model), model=model, engine="functional")
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]

    def closure():
        loss = model(x).square().mean()
        change(model)
        return loss

    with pytest.raises(RuntimeError, match="requires_grad"):
        optimizer.step(closure)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_thawed_parameter_gets_the_weighted_sum_of_its_gradients():
    p, q = (nn.Parameter(torch.tensor([1.0])) for _ in range(2))
    q.requires_grad_(False)
    optimizer = gk.wrap(torch.optim.SGD([p, q], lr=1.0), gk.Constant([2.0, 3.0]))

    def closure():
        q.requires_grad_(True)
        return {"a": (p * q).sum(), "b": (p + 10 * q).sum()}

    optimizer.step(closure)
    assert p.grad.item() == 2 * 1 + 3 * 1
    assert q.grad.item() == 2 * 1 + 3 * 10
    optimizer.step(closure)  # now with a place of its own
    assert q.item() == 1 - 32 - (2 * (1 - 5) + 3 * 10)


# Buffers and children of other kinds.


class Start(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("start", self.weight.data)


class Counts(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("all", torch.zeros(4))
        self.register_buffer("head", self.all[:2])

    def forward(self, x):
        self.all += 1
        return super().forward(x)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("engine", IN_PLACE)
def test_buffers_that_share_memory(engine, chain):
    x, _ = data()
    start, counts, x = Start(4, 2), Counts(4, 2), x.float()
    assert start.start.data_ptr() == start.weight.data_ptr()
    before = start.weight.detach().clone()
    for model in (start, counts):
        transforms = tuple(each() for each in CHAINS[chain])
        optimizer = gk.wrap(sgd(model), *transforms, model=model, engine=engine)
        optimizer.step(lambda model=model: model(x).square().mean())
    assert not torch.equal(before, start.weight)
    assert torch.equal(start.start, start.weight)
    assert counts.all.tolist() == [1, 1, 1, 1]
    assert counts.head.tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore")  # torch has deprecated scripting
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("way", ["script", "trace"])
@pytest.mark.parametrize("engine", IN_PLACE)
def test_scripted_children(way, whole, engine):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))

    def run(compile_it):
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        if compile_it:
            before = copy.deepcopy(inner.state_dict())  # a trace runs the layers
            inner = torch.jit.script(inner) if way == "script" else torch.jit.trace(inner, x)
            inner.load_state_dict(before)
            inner.train()
        model = inner if whole else nn.Sequential(nn.Linear(3, 3), inner)
        optimizer = gk.wrap(sgd(model), gk.SAM(), model=model, engine=engine)
        losses = [optimizer.step(lambda: model(x).square().mean()) for _ in range(3)]
        return torch.stack(losses), model.state_dict()

    (plain, there), (scripted, here) = run(False), run(True)
    torch.testing.assert_close(plain, scripted)
    assert here.keys() >= there.keys() - {"1.num_batches_tracked"}
    for key, value in there.items():
        torch.testing.assert_close(value, here[key])  # BatchNorm's statistics, too


@pytest.mark.filterwarnings("ignore")  # torch has deprecated scripting
def test_a_scripted_child_is_put_back_and_refused_by_the_functional_engine():
    model = nn.Sequential(nn.Linear(3, 4), torch.jit.script(nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match=r"scripted or traced.*engine='inplace'"):
        gk.wrap(sgd(model), model=model, engine="functional")
    optimizer = gk.wrap(sgd(model), model=model)
    before = copy.deepcopy(model.state_dict())

    def fails():
        model(torch.randn(4, 3)).sum()
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(fails)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# Tensor subclasses.


BY_GRAM_OR_LOSS = [gk.PCGrad, gk.UW, gk.DWA, gk.FAMO, gk.STCH, gk.GLS, gk.RLW, gk.PBI, gk.COSMOS]


class Tagged(torch.Tensor):
    """Like the images of loaders that carry facts along: every result is one, too."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("stack", "new_empty", "_foreach_copy_"):
            raise TypeError(f"{func.__name__} is not for these")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        *((rule, rows) for rule in BY_GRAM_OR_LOSS for rows in ("auto", "stream")),
        (gk.GradDrop, "auto"),
    ],
)
def test_losses_of_a_tensor_subclass(rule, rows, engine):
    x, _ = data()

    def run(wrap_input):
        model = make()

        def losses():
            y = model(wrap_input(x))
            return {"a": y[:, 0].square().mean(), "b": (y[:, 1] - 1).square().mean()}

        def generators():
            for some in x.split(4):
                y = model(wrap_input(some))
                yield {"a": y[:, 0].square().mean(), "b": (y[:, 1] - 1).square().mean()}

        torch.manual_seed(2)
        optimizer = gk.wrap(sgd(model), rule(), model=model, rows=rows, engine=engine)
        found = [optimizer.step(losses)]
        if rows == "auto":
            found.append(optimizer.step(generators))
        for value in (*found, optimizer.last_step.losses, model.weight.grad):
            assert type(value) is torch.Tensor
        return torch.stack(found), model.weight.detach()

    plain, tagged = run(lambda x: x), run(lambda x: x.as_subclass(Tagged))
    assert torch.equal(plain[0], tagged[0])
    assert torch.equal(plain[1], tagged[1])


# Maximising f is minimising -f.


def f(w):
    return w.sin().sum() + (w**3).sum() / 10


def h(w):
    return w.prod() - (w - 1).square().sum()


MAXIMISING = {
    "none": (),
    "PCGrad": (gk.PCGrad,),
    "UPGrad": (gk.UPGrad,),
    "GradDrop": (gk.GradDrop,),
    "UW": (gk.UW,),
    "RLW": (gk.RLW,),
    "SAM": (gk.SAM,),
    "LookAhead": (lambda: gk.LookAhead("b", "a"),),
    "GraTa": (lambda: gk.LookAhead("b", "a"), lambda: gk.CosineLR("a", "b")),
    "Fish": (gk.Fish,),
    "IDGM": (gk.IDGM,),
    "MLDG": (gk.MLDG,),
    "both": (gk.PCGrad, gk.SAM),
}


@pytest.mark.parametrize("make_base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(
    ("chain", "joint"),
    [
        (chain, joint)
        for chain in MAXIMISING
        for joint in (False, True)
        if not (joint and chain in ("Fish", "MLDG"))  # which take objectives one by one
    ],
)
def test_maximising_is_minimising_the_negative(chain, make_base, joint):
    ends = []
    for sign in (1.0, -1.0):
        torch.manual_seed(0)
        w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
        base = make_base([w], lr=0.1, maximize=sign > 0)
        optimizer = gk.wrap(base, *(each() for each in MAXIMISING[chain]))
        both = {"a": lambda: sign * f(w), "b": lambda: sign * h(w)}
        for _ in range(3):
            loss = optimizer.step(
                (lambda both=both: {name: each() for name, each in both.items()}) if joint else both
            )
            assert torch.sign(optimizer.last_step.losses[0]) == torch.sign(
                loss - optimizer.last_step.losses[1]
            )
        ends.append((w.detach().clone(), sign * loss, sign * w.grad))
    for here, there in zip(*ends, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chain", ["none", "PCGrad", "SAM", "both"])
def test_groups_that_maximise_beside_others(chain):
    """A minimax game: each group's own sign, whatever displaces."""
    ends = []
    for sign in (1.0, -1.0):
        u, v = (nn.Parameter(torch.tensor([0.5, z], dtype=torch.float64)) for z in (1.0, -1.0))
        flipped = torch.optim.SGD([{"params": [u]}, {"params": [v], "maximize": sign > 0}], lr=0.1)
        optimizer = gk.wrap(flipped, *(each() for each in MAXIMISING[chain]))
        # With the sign moved into the graph of `v`: its gradient only is reversed.
        reverse = lambda t: t if sign > 0 else _Reverse.apply(t)  # noqa: E731
        for _ in range(3):
            optimizer.step(
                {
                    "a": lambda: (u * reverse(v).sin()).sum(),
                    "b": lambda: (u - reverse(v)).square().sum(),
                }
            )
        ends.append((u.detach().clone(), v.detach().clone()))
    for here, there in zip(*ends, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-12)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


def test_maximising_without_a_closure_and_gradients_without_a_step():
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = gk.wrap(torch.optim.SGD([w], lr=0.5, maximize=True))
    (3 * w).sum().backward()
    optimizer.step()
    assert w.item() == 2.5
    assert w.grad.item() == 3
    assert optimizer.gradients(lambda: (3 * w).sum()).rows.item() == 3


# Losses from outside the closure, scalers, compilers.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("retains", [True, False])
@pytest.mark.parametrize("own_backward", [True, False])
def test_a_loss_that_was_computed_outside(engine, retains, own_backward):
    x, y = data()
    model = make()
    optimizer = gk.wrap(sgd(model), gk.SAM(rho=1.0), model=model, engine=engine)
    loss = (model(x) - y).square().mean()
    before = copy.deepcopy(model.state_dict())

    def closure():
        optimizer.zero_grad()
        if own_backward:
            loss.backward(retain_graph=retains)
        return loss

    with pytest.raises(RuntimeError, match=r"the loss was computed outside the closure.*inside"):
        optimizer.step(closure)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    optimizer.step(lambda: (model(x) - y).square().mean())
    assert not torch.equal(before["weight"], model.weight)


@pytest.mark.parametrize("shared", ["trunk", "all"])
def test_one_forward_pass_outside_for_several_closures(shared):
    x, y = data()
    trunk, head = nn.Sequential(make(outputs=4), nn.Tanh()), make()
    model = nn.ModuleList([trunk, head])
    optimizer = gk.wrap(sgd(model), gk.PCGrad(), model=model)
    features = trunk(x)
    error = (head(features) - y).square().mean(0)
    losses = {
        "trunk": lambda k: (head(features) - y).square().mean(0)[k],
        "all": lambda k: error[k],
    }[shared]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"'b' was computed outside .* returns all losses"):
        optimizer.step({"a": lambda: losses(0), "b": lambda: losses(1)})
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_hidden_state_that_is_carried_over_with_its_graph(engine):
    cell = nn.RNNCell(2, 3).double()
    optimizer = gk.wrap(sgd(cell), gk.Sum(), model=cell, engine=engine)
    hidden = [torch.zeros(1, 3, dtype=torch.float64)]

    def closure():
        hidden[0] = cell(torch.ones(1, 2, dtype=torch.float64), hidden[0])
        return {"a": hidden[0].sum(), "b": hidden[0].square().sum()}

    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="detach what is carried over"):
        optimizer.step(closure)


@pytest.mark.parametrize("engine", ENGINES)
def test_buffers_of_a_further_module_in_model(engine):
    generator = make(outputs=4)
    discriminator = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    both = nn.ModuleList([generator, discriminator])
    optimizer = gk.wrap(sgd(generator), gk.SAM(), model=both, engine=engine)
    x, _ = data()
    optimizer.step(lambda: -discriminator(generator(x)).mean())
    assert discriminator[0].num_batches_tracked == 1
    assert all(p.grad is None for p in discriminator.parameters())


def test_part_of_a_loss_from_outside_and_named():
    x, y = data()
    model = make()
    optimizer = gk.wrap(sgd(model), gk.SAM(), model=model)
    penalty = model.weight.square().sum()
    fit = lambda: (model(x) - y).square().mean()  # noqa: E731
    with pytest.raises(RuntimeError, match="'b' was computed outside"):
        optimizer.step({"a": fit, "b": lambda: fit() + penalty})
    other = gk.wrap(sgd(model), gk.LookAhead("b", "a"), model=model)
    with pytest.raises(RuntimeError, match="'a' was computed outside"):
        other.step({"a": lambda: penalty, "b": fit})


def test_graphs_from_outside_that_are_right_stay_so():
    """A constant part, another network's, and a step that evaluates once."""
    x, y = data()
    model, other = make(), make()
    made = other(x)  # a generator's output, its graph and all
    optimizer = gk.wrap(sgd(model), gk.SAM(), model=model)
    optimizer.step(lambda: (model(x) - made).square().mean())
    plain = gk.wrap(sgd(other), model=other)
    loss = (other(x) - y).square().mean()
    before = other.weight.detach().clone()
    plain.step(lambda: loss)
    assert not torch.equal(before, other.weight)


@pytest.mark.parametrize("part", ["all", "features"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_closure_that_keeps_its_loss_from_call_to_call(part, engine):
    x, y = data()
    model = nn.Sequential(make(outputs=3), nn.Tanh(), make(inputs=3))
    optimizer = gk.wrap(sgd(model), gk.SAM(), model=model, engine=engine)
    loss = functools.cache(lambda: (model(x) - y).square().mean())
    features = functools.cache(lambda: model[:2](x))
    closure = loss if part == "all" else lambda: model[2](features()).square().mean()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="earlier call"):
        optimizer.step(closure)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_forward_pass_in_another_thread(engine):
    """Its nodes have lower sequence numbers than the main thread's, as if they were older."""
    x, y = data()
    model, expected = make(), make()
    for _ in range(9):
        model(x).sum().backward()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        def objectives(model, run):
            error = lambda k: (model(x) - y)[:, k].square().mean()  # noqa: E731
            return {"auxiliary": lambda: run(error, 0), "pseudo": lambda: run(error, 1)}

        in_thread = objectives(model, lambda *call: pool.submit(*call).result())
        optimizer = gk.wrap(sgd(model), gk.LookAhead(), model=model, engine=engine)
        optimizer.step(in_thread)
    other = gk.wrap(sgd(expected), gk.LookAhead(), model=expected, engine=engine)
    other.step(objectives(expected, lambda error, k: error(k)))
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_error_of_a_closure_with_a_part_from_outside():
    """Only what autograd says of such a graph is put in other words."""
    model = make()
    penalty = model.bias.sum()
    optimizer = gk.wrap(sgd(model), gk.SAM(), model=model)
    calls = []

    def closure():
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("no memory left")
        return model(data()[0]).sum() + penalty

    with pytest.raises(RuntimeError, match="no memory left"):
        optimizer.step(closure)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("when", ["inside", "before"])
def test_a_scaler_that_was_told_to_unscale(chain, when):
    x, _ = data()
    model = make().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    transforms = tuple(each() for each in CHAINS[chain])
    optimizer = gk.wrap(sgd(model), *transforms, model=model, scaler=scaler)
    before = copy.deepcopy(model.state_dict())

    def closure(unscales):
        optimizer.zero_grad()
        loss = model(x.float()).square().mean()
        scaler.scale(loss).backward()
        if unscales:
            scaler.unscale_(optimizer)
        return loss

    if when == "before":
        closure(True)
    with pytest.raises(RuntimeError, match=r"unscales gradients itself.*max_norm="):
        optimizer.step(lambda: closure(when == "inside"))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    if when == "inside":
        optimizer.step(lambda: closure(False))
        assert optimizer.last_step.applied


def test_a_compiled_function_that_steps():
    torch.manual_seed(0)
    x, y = torch.rand(16, 8), torch.rand(16, 2)

    def run(compile_it):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        network = torch.compile(model, backend="eager") if compile_it else model
        optimizer = gk.wrap(torch.optim.Adam(model.parameters(), 1e-2), gk.SAM(), model=model)

        def loop():
            return optimizer.step(lambda: (network(x) - y).square().mean())

        if compile_it:
            loop = torch.compile(loop, backend="eager")
        return torch.stack([loop() for _ in range(3)])

    torch.testing.assert_close(run(True), run(False))


# Steps that have nothing to step on, and settings that do nothing.


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_to_step_on_is_torchs_no_op(engine):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    x = torch.randn(4, 3)
    optimizer = gk.wrap(torch.optim.Adam(model.parameters()), gk.SAM(), model=model, engine=engine)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="the loss is None"):
        assert optimizer.step(lambda: None) is None
    loss = optimizer.step(lambda: model(x).detach().square().mean())  # it is said once
    assert calls == ["pre", "post"] * 2
    assert not loss.requires_grad
    assert not optimizer.last_step.applied
    assert optimizer.last_step.losses[0] == loss
    assert model[1].num_batches_tracked == 1  # the forward pass has been
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    optimizer.step(lambda: model(x).square().mean())
    assert optimizer.last_step.applied
    assert optimizer.base.state_dict()["state"] != {}


def test_frozen_parameters_are_a_no_op():
    p = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([p], lr=0.1))
    p.requires_grad_(False)
    with pytest.warns(UserWarning, match="nothing to step on"):
        assert optimizer.step() is None
    assert optimizer.step(lambda: p.sum()).item() == 2
    assert p.tolist() == [1, 1]
    p.requires_grad_(True)
    optimizer.step(lambda: p.sum())
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.9))


def test_one_of_several_objectives_without_a_gradient_is_an_error():
    p = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([p], lr=0.1))
    for objectives in (
        {"a": lambda: p.sum(), "b": lambda: torch.tensor(1.0)},
        lambda: {"b": torch.tensor(1.0), "a": p.sum()},
    ):
        with pytest.raises(gk.NoGradientError, match="'b' produced no gradient"):
            optimizer.step(objectives)


def test_a_micro_batch_without_a_gradient_is_an_error_once_there_was_one():
    p = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([p], lr=0.1))

    def closure():
        yield p.sum()
        yield torch.tensor(1.0)

    with pytest.raises(gk.NoGradientError):
        optimizer.step(closure)
    assert p.tolist() == [1, 1]


@pytest.mark.parametrize("rule", [gk.PCGrad, gk.UW, gk.GradDrop, gk.IDGM, gk.AgrSum])
def test_surgery_on_one_objective_is_warned_of_once(rule):
    p = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([p], lr=0.1), rule())
    with pytest.warns(UserWarning, match=f"{rule.__name__}.*acts between objectives"):
        optimizer.step(lambda: p.square().sum())
    optimizer.step(lambda: p.square().sum())  # it is said once
    several = gk.wrap(torch.optim.SGD([p], lr=0.1), rule())
    several.step({"a": lambda: p.square().sum(), "b": lambda: p.exp().sum()})
    several.step({"a": lambda: p.square().sum()})  # one is absent today
    gk.wrap(torch.optim.SGD([p], lr=0.1), gk.Sum()).step(lambda: p.sum())


def test_a_model_of_somebody_else_is_refused():
    with pytest.raises(ValueError, match="model= holds none of the parameters"):
        gk.wrap(sgd(make()), gk.SAM(), model=make())


# What is left behind.


def test_small_gradients_keep_and_pickle_their_own_size():
    model = nn.Linear(2000, 3)  # tests take parameters of four numbers for large ones
    x = torch.randn(4, 2000)
    optimizer = gk.wrap(sgd(model), gk.PCGrad(), model=model)
    optimizer.step({"a": lambda: model(x).square().mean(), "b": lambda: model(x).mean()})
    assert model.bias.grad.untyped_storage().nbytes() == 4 * 3
    buffer = io.BytesIO()
    torch.save(model.bias.grad, buffer)
    assert buffer.tell() < 4000


class Slow(gk.Transform):
    """Keeps the weights that the first step has found."""

    def __init__(self):
        self.grad_enabled = None

    def initial_vectors(self, layout):
        self.grad_enabled = torch.is_grad_enabled()
        return {"slow": layout.flatten(layout.local_parameters()) * 2}


def test_initial_vectors_are_made_at_the_first_step_without_gradients():
    model = make()
    transform = Slow()
    optimizer = gk.wrap(sgd(model), transform, model=model)
    assert transform.vectors == {}
    later = {key: value + 1 for key, value in model.state_dict().items()}
    model.load_state_dict(later)
    x, _ = data()
    optimizer.step(lambda: model(x).square().mean())
    assert transform.grad_enabled is False
    expected = 2 * torch.cat([value.reshape(-1) for value in later.values()])
    assert torch.equal(transform.vectors["slow"], expected)
    assert not transform.vectors["slow"].requires_grad


class Proposes(gk.Transform):
    def __init__(self, value):
        self.value = value
        self.state["mean"] = None

    def around(self, inner, context):
        context.propose(self, mean=self.value)
        return inner


def test_large_tensors_are_no_small_state():
    model = nn.Linear(100, 100)
    x = torch.randn(2, 100)
    count = sum(p.numel() for p in model.parameters())
    for value, fits in (
        (torch.zeros(count), False),
        (torch.zeros(1500, 1500), False),
        (torch.eye(64), True),
    ):
        optimizer = gk.wrap(sgd(model), Proposes(value), model=model)
        if fits:
            optimizer.step(lambda: model(x).mean())
        else:
            with pytest.raises(ValueError, match=r"'mean'.*initial_vectors"):
                optimizer.step(lambda: model(x).mean())
