import copy
import itertools
import weakref

import pytest
import torch
from helpers import batches, flat, relative_error, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import gradkit as gk
from gradkit.core.flat import Layout

ENGINES = ["functional", "inplace"]


# Networks. Each is made in float64 with weights from a generator, and maps its input to [N, 2].


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


class LastOutput(nn.Module):
    def forward(self, x):
        return x[0][:, -1]


class Tied(nn.Module):
    """An autoencoder of symbols whose decoder is its embedding, transposed."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Embedding(5, 2)
        self.middle = nn.Linear(2, 2)
        self.decoder = nn.Linear(2, 5, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(torch.tanh(self.middle(self.encoder(x).mean(1))))[:, :2]


class Counting(nn.Module):
    """Buffers that are written in place, replaced, and not saved; one has no value."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("last", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x):
        y = self.linear(x)
        self.calls += 1
        self.average = 0.5 * self.average + 0.5 * y.detach().mean(0)
        self.last = y.detach()[-1]
        return y + 0.1 * self.average


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.last = nn.Linear(4, 2)
        self.first.weight.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def convolutions(*norms):
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        *norms,
        nn.Tanh(),
        nn.Conv2d(3, 2, 2),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (3,)),
    "batch norm": (lambda: convolutions(nn.BatchNorm2d(3)), (2, 3, 3)),
    "channels last": (lambda: convolutions().to(memory_format=torch.channels_last), (2, 3, 3)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 3), Mean(), nn.Linear(3, 2)), "symbols"),
    "tied": (Tied, "symbols"),
    "recurrent": (
        lambda: nn.Sequential(nn.GRU(3, 2, batch_first=True), LastOutput(), nn.Linear(2, 2)),
        (4, 3),
    ),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)), (3,)),
    "buffers": (Counting, (3,)),
    "frozen": (Frozen, (3,)),
}
WITHOUT_BATCH_STATISTICS = sorted(set(NETWORKS) - {"batch norm", "buffers"})


def network(name, seed=0):
    make, _ = NETWORKS[name]
    model = make().double()
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.6 * noise)
    return model


def data(name, seed, count=6):
    generator = seeded(1000 + seed)
    _, shape = NETWORKS[name]
    if shape == "symbols":
        x = torch.randint(5, (count, 3), generator=generator)
    else:
        x = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randn(count, 2, generator=generator, dtype=torch.float64)


def error(output, y):
    return (output - y)[:, 0].square().mean()


def disagreement(output, y):
    return (output + 2 * y).sum(1).cosh().log().mean()


# The forms in which objectives can be given. All of them compute the same losses "a" and "b".


def as_mapping(model, optimizer, x, y):
    return {"a": lambda: error(model(x), y), "b": lambda: disagreement(model(x), y)}


def as_one_closure(model, optimizer, x, y):
    def closure():
        output = model(x)
        return {"a": error(output, y), "b": disagreement(output, y)}

    return closure


def as_backward_closures(model, optimizer, x, y):
    def with_backward(closure):
        def body():
            optimizer.zero_grad()
            loss = closure()
            loss.backward()
            return loss

        return body

    closures = as_mapping(model, optimizer, x, y)
    return {name: with_backward(closure) for name, closure in closures.items()}


def shares(x, y, parts=3):
    """Micro-batches and their shares of the whole; of unequal sizes."""
    cuts = [0, 1, len(x) // 2, len(x)] if parts == 3 else [0, len(x)]
    for start, stop in itertools.pairwise(cuts):
        yield x[start:stop], y[start:stop], (stop - start) / len(x)


def as_generators(model, optimizer, x, y):
    def source():
        for xs, ys, share in shares(x, y):
            yield share * error(model(xs), ys)

    def target():
        for xs, ys, share in shares(x, y):
            yield share * disagreement(model(xs), ys)

    return {"a": source, "b": target}


def as_one_generator(model, optimizer, x, y):
    def closure():
        for xs, ys, share in shares(x, y):
            output = model(xs)
            yield {"a": share * error(output, ys), "b": share * disagreement(output, ys)}

    return closure


def as_backward_generators(model, optimizer, x, y):
    def with_backward(generator):
        def body():
            optimizer.zero_grad()
            for loss in generator():
                loss.backward()
                yield loss

        return body

    generators = as_generators(model, optimizer, x, y)
    return {name: with_backward(generator) for name, generator in generators.items()}


FORMS = {
    "mapping": as_mapping,
    "one closure": as_one_closure,
    "backward closures": as_backward_closures,
    "generators": as_generators,
    "one generator": as_one_generator,
    "backward generators": as_backward_generators,
}


# Chains of transforms on the objectives "a" and "b", innermost first.


LINKS = {
    "PCGrad": lambda model: gk.PCGrad(generator=seeded(0)),
    "PCGrad by tensor": lambda model: gk.PCGrad(scope="tensor", generator=seeded(0)),
    "PCGrad by group": lambda model: gk.PCGrad(scope="group", generator=seeded(0)),
    "Mean": lambda model: gk.Mean(),
    "SAM": lambda model: gk.SAM(rho=0.1),
    "CosineLR": lambda model: gk.CosineLR("a", "b", "linear"),
    "LookAhead": lambda model: gk.LookAhead(along="b", update="a", step_size=0.1),
    "EMA": lambda model: gk.EMA(model, decay=0.7),
    "GatedEMA": lambda model: gk.GatedEMA(model, between=("a", "b"), decay_conflict=0.5),
}
RULES = {"PCGrad", "PCGrad by tensor", "PCGrad by group", "Mean"}


def composes(chain):
    """Whether wrap() takes the chain: nothing that weighs or joins rows after a rule by block."""
    blocked = False
    for name in chain:
        if blocked and (name in RULES or name == "LookAhead"):
            return False
        blocked = blocked or " by " in name
    return True


chains = st.lists(st.sampled_from(sorted(LINKS)), max_size=3, unique=True).filter(composes)


def run(name, engine, chain, form, seed, steps=2, **options):
    """A few steps; returns the model, its teachers and the records of the steps."""
    model = network(name, seed)
    transforms = [LINKS[link](model) for link in chain]
    trainable = list(model.parameters())
    groups = [{"params": trainable[:1]}, {"params": trainable[1:], "lr": 0.1}]
    optimizer = gk.wrap(
        torch.optim.SGD(groups, lr=0.05, momentum=0.9),
        *transforms,
        model=model,
        engine=engine,
        **options,
    )
    records = []
    for step in range(steps):
        loss = optimizer.step(form(model, optimizer, *data(name, seed + step)))
        records.append((loss, optimizer.last_step))
    teachers = [transform.teacher for transform in transforms if hasattr(transform, "teacher")]
    return [model, *teachers], records


def assert_equal_runs(one, other, *, buffers=True, losses=True, tolerance=1e-12):
    (models, records), (others, other_records) = one, other
    for model, theirs in zip(models, others, strict=True):
        assert relative_error(flat(model.parameters()), flat(theirs.parameters())) < tolerance
        for mine, yours in zip(model.parameters(), theirs.parameters(), strict=True):
            assert (mine.grad is None) == (yours.grad is None)
        if buffers:
            pairs = zip(model.named_buffers(), theirs.named_buffers(), strict=True)
            for (name, mine), (_, yours) in pairs:
                assert mine.dtype == yours.dtype
                assert relative_error(mine, yours) < tolerance, name
    for (loss, record), (other_loss, other_record) in zip(records, other_records, strict=True):
        assert not losses or relative_error(loss, other_loss) < tolerance
        assert record.names == other_record.names
        for field in (*(["losses"] if losses else []), "gram", "weights", "lr_scale"):
            mine, yours = getattr(record, field), getattr(other_record, field)
            assert relative_error(mine, yours) < 10 * tolerance, field
        for field in ("gate", "decay"):
            mine, yours = getattr(record, field), getattr(other_record, field)
            assert (mine is None) == (yours is None)
            assert mine is None or torch.equal(mine, yours)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(NETWORKS)),
    chains,
    st.sampled_from(sorted(FORMS)),
    st.integers(0, 10_000),
)
def test_the_engines_agree(name, chain, form, seed):
    if name == "batch norm" and "generator" in form:
        form = "mapping"  # a batch of one has no statistics
    runs = [run(name, engine, chain, FORMS[form], seed) for engine in ENGINES]
    assert_equal_runs(*runs)


@pytest.mark.parametrize("chain", [(), ("PCGrad", "SAM"), ("LookAhead", "CosineLR", "SAM")])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_engines_agree_on_every_network(name, chain):
    runs = [run(name, engine, chain, as_mapping, 3, steps=3) for engine in ENGINES]
    assert_equal_runs(*runs)
    start = network(name, 3)
    assert relative_error(flat(runs[0][0][0].parameters()), flat(start.parameters())) > 1e-3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", sorted(set(FORMS) - {"mapping"}))
@pytest.mark.parametrize("chain", [("PCGrad",), ("SAM", "PCGrad"), ("LookAhead", "CosineLR")])
def test_every_form_gives_the_same_update(engine, form, chain):
    # One closure for both computes "a" at θ already, where a mapping evaluates it ahead only.
    losses = not ("LookAhead" in chain and form in ("one closure", "one generator"))
    for name in WITHOUT_BATCH_STATISTICS:
        runs = [run(name, engine, chain, make, 5) for make in (as_mapping, FORMS[form])]
        assert_equal_runs(*runs, losses=losses, tolerance=1e-11)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", ["one closure", "backward closures"])
def test_forms_of_whole_batches_agree_under_batch_norm(engine, form):
    """The statistics differ: one forward for both objectives moves them once, two do twice."""
    runs = [run("batch norm", engine, ("PCGrad",), make, 5) for make in (as_mapping, FORMS[form])]
    assert_equal_runs(*runs, buffers=False, tolerance=1e-11)
    counts = [int(models[0][1].num_batches_tracked) for models, _ in runs]
    assert counts == ([4, 2] if form == "one closure" else [4, 4])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("transforms", [(), (gk.SAM,), (gk.PCGrad, gk.SAM)])
def test_every_form_of_one_objective_gives_the_same_update(engine, transforms):
    x, y = data("linear", 0)

    def plain(model, optimizer):
        return lambda: error(model(x), y)

    def backward(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = error(model(x), y)
            loss.backward()
            return loss

        return closure

    def silent(model, optimizer):
        closure = backward(model, optimizer)

        def body():
            closure()

        return body

    def generator(model, optimizer):
        def closure():
            for xs, ys, share in shares(x, y):
                yield share * error(model(xs), ys)

        return closure

    def backward_generator(model, optimizer):
        def closure():
            for xs, ys, share in shares(x, y):
                loss = share * error(model(xs), ys)
                loss.backward()
                yield loss

        return closure

    def accumulating(model, optimizer):
        """Micro-batches inside an ordinary closure, as torch users write them."""

        def closure():
            model.zero_grad()
            total = 0.0
            for xs, ys, share in shares(x, y):
                loss = share * error(model(xs), ys)
                loss.backward()
                total = total + loss.detach()
            return total

        return closure

    def named(model, optimizer):
        return {"loss": plain(model, optimizer)}

    results = []
    for form in (plain, named, backward, silent, generator, backward_generator, accumulating):
        model = network("linear", 1)
        optimizer = gk.wrap(
            torch.optim.SGD(model.parameters(), lr=0.1),
            *(make() for make in transforms),
            model=model,
            engine=engine,
        )
        loss = optimizer.step(form(model, optimizer))
        assert optimizer.last_step.names == ("loss",)
        assert loss.isnan() if form is silent else float(loss) > 0
        results.append((flat(model.parameters()), loss, optimizer.last_step.gram))
    for weights, loss, gram in results:
        assert relative_error(weights, results[0][0]) < 1e-13
        assert relative_error(gram, results[0][2]) < (1e-6 if loss.isnan() else 1e-12)
        if not loss.isnan():
            assert relative_error(loss, results[0][1]) < 1e-13


class Held:
    """A tensor that autograd keeps for a backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", ["generators", "one generator", "backward generators"])
def test_a_micro_batch_is_freed_before_the_next(engine, form):
    model = network("linear")
    optimizer, _ = optimizer_of(model, gk.PCGrad(), gk.SAM(), engine=engine)
    held, left = weakref.WeakSet(), []

    def pack(tensor):
        kept = Held(tensor)
        held.add(kept)
        return kept

    def watched(generator):
        def body():
            for item in generator():
                assert held or "backward" in form
                yield item
                del item
                left.append(len(held))

        return body

    objectives = FORMS[form](model, optimizer, *data("linear", 0))
    if isinstance(objectives, dict):
        objectives = {name: watched(generator) for name, generator in objectives.items()}
    else:
        objectives = watched(objectives)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        optimizer.step(objectives)
    assert left == [0] * (6 if form == "one generator" else 12)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_closure_cannot_call_backward_on_several_losses(engine):
    model = network("linear")
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model=model, engine=engine)
    x, y = data("linear", 0)

    def closure():
        losses = {"a": error(model(x), y), "b": disagreement(model(x), y)}
        sum(losses.values()).backward()
        return losses

    before = flat(model.parameters())
    with pytest.raises(RuntimeError, match="called backward and returned several losses"):
        optimizer.step(closure)
    assert torch.equal(flat(model.parameters()), before)


# gradients(at=...) against autograd.


def optimizer_of(model, *transforms, engine, lr=0.1, **options):
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = torch.optim.SGD(trainable, lr=lr)
    return gk.wrap(base, *transforms, model=model, engine=engine, **options), Layout.of(
        base.param_groups
    )


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(NETWORKS)),
    st.sampled_from(ENGINES),
    st.sampled_from(["mapping", "one closure", "backward closures"]),
    st.integers(0, 10_000),
)
def test_displaced_gradients_are_autograds_at_displaced_weights(name, engine, form, seed):
    model = network(name, seed)
    x, y = data(name, seed)
    optimizer, layout = optimizer_of(model, engine=engine)
    at = torch.randn(layout.numel, generator=seeded(seed), dtype=torch.float64) / 3
    before = copy.deepcopy(model)
    gradients = optimizer.gradients(FORMS[form](model, optimizer, x, y), at=at)

    moved = copy.deepcopy(model)
    trainable = [parameter for parameter in moved.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter, part in zip(trainable, layout.views(at), strict=True):
            parameter.add_(part)
    output = moved(x)
    for row, value, loss in zip(
        gradients.rows, gradients.losses, (error, disagreement), strict=True
    ):
        expected = loss(output, y)
        grads = torch.autograd.grad(expected, trainable, retain_graph=True, allow_unused=True)
        zeros = map(torch.zeros_like, trainable)
        grads = [g if g is not None else z for g, z in zip(grads, zeros, strict=True)]
        assert relative_error(row, layout.flatten(grads)) < 1e-13
        assert relative_error(value, expected.detach()) < 1e-13
        if form != "one closure":
            output = moved(x)  # on the buffers that the first forward has left
    # Nothing is left of it.
    for (key, now), old in zip(
        model.state_dict().items(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(now, old), key
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_displacement_by_nothing_is_none(name, engine):
    model = network(name)
    optimizer, layout = optimizer_of(model, engine=engine)
    objectives = as_mapping(model, optimizer, *data(name, 0))
    here = optimizer.gradients(objectives)
    zeros = torch.zeros(layout.numel, dtype=torch.float64)
    there = optimizer.gradients(objectives, at=zeros)
    assert torch.equal(here.rows, there.rows)
    assert torch.equal(here.losses, there.losses)
    assert here.reached == there.reached


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_named_objectives_are_evaluated(engine):
    model = network("linear")
    optimizer, _ = optimizer_of(model, engine=engine)
    x, y = data("linear", 0)

    def never():
        raise AssertionError("not asked for")

    closures = as_mapping(model, optimizer, x, y)
    both = optimizer.gradients(closures)
    one = optimizer.gradients({**closures, "a": never}, only=["b"])
    assert one.names == ("b",)
    assert torch.equal(one.rows, both.rows[1:])
    joint = optimizer.gradients(as_one_closure(model, optimizer, x, y), only=["b"])
    assert joint.names == ("b",)
    assert relative_error(joint.rows, one.rows) < 1e-14
    with pytest.raises(ValueError, match="there is no objective 'c'; there are 'a', 'b'"):
        optimizer.gradients(closures, only=["c"])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_live_weights_come_back_bit_for_bit(engine):
    """Adding a displacement and taking it away again would change the last bits."""
    model = network("linear").float()
    optimizer, layout = optimizer_of(model, engine=engine)
    x, y = (tensor.float() for tensor in data("linear", 0))
    before = flat(model.parameters())
    at = 1e3 * torch.randn(layout.numel, generator=seeded(0))
    gradients = optimizer.gradients(lambda: error(model(x), y), at=at)
    assert torch.equal(flat(model.parameters()), before)
    assert not torch.equal((before + at) - at, before)
    assert gradients.rows.abs().max() > 0


def test_the_functional_engine_never_writes_to_the_weights():
    model = network("batch norm")
    optimizer, _ = optimizer_of(model, gk.SAM(rho=1.0), engine="functional", lr=0.0)
    x, y = data("batch norm", 0)
    versions = [tensor._version for tensor in (*model.parameters(), *model.buffers())]
    seen, live = [], list(model.parameters())

    def closure():
        assert all(a is not b for a, b in zip(model.parameters(), live, strict=True))
        seen.append(flat(model.parameters()))
        return error(model(x), y)

    optimizer.gradients(closure)
    assert [t._version for t in (*model.parameters(), *model.buffers())] == versions
    optimizer.step(closure)
    assert not torch.equal(seen[1], seen[2])  # SAM's second point


@pytest.mark.parametrize("engine", ENGINES)
def test_model_parameters_inside_a_closure_see_the_displacement(engine):
    model = network("linear")
    optimizer, layout = optimizer_of(model, engine=engine)
    at = torch.randn(layout.numel, generator=seeded(0), dtype=torch.float64)

    def closure():
        return sum(parameter.square().sum() for parameter in model.parameters())

    row = optimizer.gradients(closure, at=at).rows[0]
    expected = 2 * (layout.flatten([p.detach() for p in layout.parameters]) + at)
    torch.testing.assert_close(row, expected)


# Mixed dtypes.


class MixedPrecision(nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow = nn.Linear(3, 4, dtype=torch.bfloat16)
        self.wide = nn.Linear(4, 2)

    def forward(self, x):
        return self.wide(torch.tanh(self.narrow(x.bfloat16())).float())


def test_bfloat16_beside_float32():
    results = []
    for engine in ENGINES:
        model = MixedPrecision()
        with torch.no_grad():
            for seed, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=seeded(seed)))
        start = flat(parameter.float() for parameter in model.parameters())
        optimizer, layout = optimizer_of(model, gk.PCGrad(), gk.SAM(rho=0.5), engine=engine)
        assert layout.dtype == torch.float32
        for step in range(3):
            x, y = (tensor.float() for tensor in data("linear", step))
            optimizer.step(as_mapping(model, optimizer, x, y))
        assert [p.grad.dtype for p in model.parameters()] == [p.dtype for p in model.parameters()]
        assert optimizer.last_step.gram.dtype == torch.float32
        results.append((flat(p.float() for p in model.parameters()), optimizer.last_step.gram))
    assert not torch.equal(results[0][0], start)
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches_of_bfloat16_add_up_in_float32(engine):
    """256 + 1 + 1 + … would stay 256 in bfloat16."""
    narrow = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    model = nn.ParameterList([narrow, torch.zeros(1)])
    optimizer, _ = optimizer_of(model, engine=engine)

    def closure():
        yield 256 * model[0].float().sum()
        for _ in range(8):
            yield model[0].float().sum()

    rows = optimizer.gradients(closure).rows
    assert rows.tolist() == [[264.0, 0.0]]


# Random numbers.


class Dropping(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.first, self.last = nn.Linear(3, 20).double(), nn.Linear(20, 2).double()
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=seeded(seed), dtype=torch.float64)
                parameter.copy_(0.5 * noise)

    def forward(self, x):
        return self.last(self.dropout(torch.tanh(self.first(x))))


def manual_sam(model, losses, rho, *, replay):
    """SAM's gradient by hand; `losses` draw their masks from the global generator."""
    parameters = list(model.parameters())

    def gradient():
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for number, loss in enumerate(losses):
            state = torch.get_rng_state()
            if replay and number in masks:
                torch.set_rng_state(masks[number])
            else:
                masks[number] = state
            for part, grad in zip(total, torch.autograd.grad(loss(), parameters), strict=True):
                part += grad
            if replay and len(masks) == len(losses) and number in seen:
                torch.set_rng_state(state)
            seen.add(number)
        return total

    masks, seen = {}, set()
    first = gradient()
    length = flat(first).norm()
    saved = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter, grad in zip(parameters, first, strict=True):
            parameter.add_(rho * grad / (length + 1e-12))
    second = gradient()
    model.load_state_dict(saved)
    return flat(second)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("form", ["mapping", "one closure"])
def test_dropout_masks_at_the_displaced_point(engine, replay, form):
    x, y = data("linear", 0)
    by_hand = Dropping()
    if form == "mapping":
        losses = [lambda: error(by_hand(x), y), lambda: disagreement(by_hand(x), y)]
    else:

        def joint():
            output = by_hand(x)
            return error(output, y) + disagreement(output, y)

        losses = [joint]
    torch.manual_seed(3)
    expected = manual_sam(by_hand, losses, 0.5, replay=replay)
    state = torch.get_rng_state()

    model = Dropping()
    optimizer, _ = optimizer_of(model, gk.SAM(rho=0.5), engine=engine, replay_rng=replay)
    torch.manual_seed(3)
    optimizer.step(FORMS[form](model, optimizer, x, y))
    assert relative_error(flat(p.grad for p in model.parameters()), expected) < 1e-13
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("engine", ENGINES)
def test_replaying_makes_a_difference_and_costs_no_random_numbers(engine):
    x, y = data("linear", 0)
    gradients, states = [], []
    for replay in (True, False):
        model = Dropping()
        optimizer, _ = optimizer_of(model, gk.SAM(rho=0.5), engine=engine, replay_rng=replay)
        torch.manual_seed(3)
        optimizer.step(lambda model=model: error(model(x), y))
        gradients.append(flat(p.grad for p in model.parameters()))
        states.append(torch.get_rng_state())
    assert not torch.allclose(*gradients)
    model = Dropping()
    torch.manual_seed(3)
    for state in states:
        model(x)  # one forward with replay, two without
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_seed_gives_the_same_bits(engine):
    def run(seed):
        torch.manual_seed(seed)
        model = Dropping(seed)
        ema = gk.EMA(model, decay=0.9)
        optimizer = gk.wrap(
            torch.optim.AdamW(model.parameters(), lr=0.01),
            gk.PCGrad(generator=seeded(seed)),
            gk.SAM(rho=0.2),
            ema,
            model=model,
            engine=engine,
        )
        for step, (x, y) in enumerate(batches(10, outputs=2)):
            objectives = as_mapping(model, optimizer, x, y)
            if step > 0:
                objectives["c"] = lambda x=x, step=step: model(x).square().mean() * step
            optimizer.step(objectives)
        tensors = [*model.parameters(), *ema.teacher.parameters(), optimizer.last_step.gram]
        return flat(tensors), torch.get_rng_state(), optimizer.transforms[0].generator.get_state()

    first, second, other = run(0), run(0), run(1)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first[0], other[0])


# Checkpointing.


class Checkpointed(nn.Module):
    def __init__(self, model, *, active=True):
        super().__init__()
        self.model = model
        self.active = active
        self.recomputed = 0

    def forward(self, x):
        def body(x):
            self.recomputed += 1
            return self.model(x)

        return checkpoint(body, x, use_reentrant=False) if self.active else body(x)


@pytest.mark.parametrize("form", ["mapping", "one closure", "backward closures", "generators"])
@pytest.mark.parametrize("make", [Dropping, lambda: network("linear")])
def test_checkpointing_changes_nothing(form, make):
    x, y = data("linear", 0)
    results = []
    for engine, active in itertools.product(ENGINES, (False, True)):
        model = Checkpointed(make(), active=active)
        optimizer, _ = optimizer_of(model, gk.PCGrad(), gk.SAM(rho=0.5), engine=engine)
        torch.manual_seed(0)
        for _ in range(2):
            optimizer.step(FORMS[form](model, optimizer, x, y))
        results.append((flat(model.parameters()), model.recomputed))
    for weights, _ in results[1:]:
        assert relative_error(weights, results[0][0]) < 1e-12
    calls = [recomputed for _, recomputed in results]
    # The forward did run again, once for each backward pass through it.
    assert calls[0] == calls[2]
    assert calls[1] == calls[3] == (3 if form == "one closure" else 2) * calls[0]


# References that bypass the model.


@pytest.mark.parametrize("kind", ["loss", "backward"])
def test_a_cached_parameter_list_is_refused_by_name(kind):
    model = network("linear")
    optimizer, _ = optimizer_of(model, gk.SAM(), engine="functional")
    x, y = data("linear", 0)
    cached = list(model.parameters())
    before = flat(model.parameters())

    def closure():
        loss = error(model(x), y) + cached[2].square().sum()
        if kind == "backward":
            loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"depends on the parameter '2\.weight'.*inplace"):
        optimizer.step(closure)
    assert torch.equal(flat(model.parameters()), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_inplace_engine_sees_cached_parameters_displaced():
    model = network("linear")
    optimizer, layout = optimizer_of(model, engine="inplace")
    cached = list(model.parameters())
    at = torch.ones(layout.numel, dtype=torch.float64)
    row = optimizer.gradients(lambda: sum(p.square().sum() for p in cached), at=at).rows[0]
    torch.testing.assert_close(row, 2 * (flat(cached) + 1))


def test_auto_is_in_place():
    """The functional engine shows closures other parameters than the live ones."""

    def kind(**options):
        seen, live = [], list(model.parameters())

        def closure():
            seen.append(all(a is b for a, b in zip(model.parameters(), live, strict=True)))
            return sum(p.square().sum() for p in model.parameters())

        gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), **options).step(closure)
        return "inplace" if seen[0] else "functional"

    model = network("linear")
    assert kind(model=model) == "inplace"
    assert kind() == "inplace"
    assert kind(model=model[0]) == "inplace"
    assert kind(model=nn.ModuleList([model, nn.Linear(1, 1)]), engine="functional") == "functional"
    assert kind(model=model, engine="inplace") == "inplace"


# Buffers.


def statistics(model):
    return [buffer.clone() for buffer in model.buffers()]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["batch norm", "buffers"])
@pytest.mark.parametrize("chain", [(), ("SAM",), ("PCGrad", "SAM"), ("SAM", "PCGrad")])
def test_each_objectives_first_evaluation_moves_the_buffers_in_order(engine, name, chain):
    model = network(name)
    (xa, y), (xb, _) = data(name, 0), data(name, 1)
    expected = copy.deepcopy(model)
    expected(xa)
    expected(xb)
    swapped = copy.deepcopy(model)
    swapped(xb)
    swapped(xa)
    optimizer, _ = optimizer_of(model, *(LINKS[link](model) for link in chain), engine=engine)
    optimizer.step({"a": lambda: error(model(xa), y), "b": lambda: disagreement(model(xb), y)})
    for ours, theirs in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    differs = [
        not torch.allclose(ours, theirs)
        for ours, theirs in zip(model.buffers(), swapped.buffers(), strict=True)
    ]
    assert any(differs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["batch norm", "buffers"])
def test_a_first_evaluation_counts_wherever_it_is_taken(engine, name):
    """LookAhead's second objective is first evaluated at displaced weights, after the other."""
    model = network(name)
    (xa, y), (xb, _) = data(name, 0), data(name, 1)
    expected = copy.deepcopy(model)
    parameters = list(expected.parameters())
    g = torch.autograd.grad(disagreement(expected(xb), y), parameters)
    with torch.no_grad():
        for parameter, part in zip(parameters, g, strict=True):
            parameter.sub_(0.1 * part)
    expected(xa)
    transforms = [LINKS[link](model) for link in ("LookAhead", "CosineLR", "SAM")]
    optimizer, _ = optimizer_of(model, *transforms, engine=engine)
    optimizer.step({"a": lambda: error(model(xa), y), "b": lambda: disagreement(model(xb), y)})
    for ours, theirs in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches_move_the_buffers_one_after_the_other(engine):
    model = network("buffers")
    x, y = data("buffers", 0)
    expected = copy.deepcopy(model)
    for xs, _, _ in shares(x, y):
        expected(xs)
    optimizer, _ = optimizer_of(model, gk.SAM(), engine=engine)

    def closure():
        for xs, ys, share in shares(x, y):
            yield share * error(model(xs), ys)

    optimizer.step(closure)
    assert int(model.calls) == 3
    for ours, theirs in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_buffer_is_the_same_object_afterwards_and_shared_ones_stay_shared(engine):
    """In place where the module writes in place, so that references to it stay valid."""
    first, second = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    second.running_mean = first.running_mean
    model = nn.Sequential(first, second, nn.Linear(3, 2).double())
    mean = first.running_mean
    optimizer, _ = optimizer_of(model, gk.SAM(), engine=engine)
    x, y = data("linear", 0)
    expected = copy.deepcopy(model)
    expected(x)
    optimizer.step(lambda: error(model(x), y))
    assert first.running_mean is mean
    assert second.running_mean is mean
    torch.testing.assert_close(mean, expected[0].running_mean)


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_mode_leaves_the_buffers_alone(engine):
    model = network("batch norm").eval()
    x, y = data("batch norm", 0)
    before = statistics(model)
    optimizer, _ = optimizer_of(model, gk.SAM(), engine=engine)
    optimizer.step(lambda: error(model(x), y))
    for now, old in zip(model.buffers(), before, strict=True):
        assert torch.equal(now, old)


# What the base optimizer finds.


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_of_unreached_and_observed_parameters(engine):
    model = network("frozen")
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), model=model, engine=engine
    )
    frozen, unused = model.first.weight.clone(), model.unused.detach().clone()
    optimizer.step(as_mapping(model, optimizer, *data("frozen", 0)))
    # The base skips what no graph reached: not even weight decay moves it.
    assert model.unused.grad is None
    assert model.first.weight.grad is None
    assert torch.equal(model.unused, unused)
    assert torch.equal(model.first.weight, frozen)
    assert model.last.bias.grad is not None


@pytest.mark.parametrize("engine", ENGINES)
def test_channels_last_gradients_keep_their_memory_format(engine):
    model = network("channels last")
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    optimizer, _ = optimizer_of(model, gk.PCGrad(), gk.SAM(), engine=engine)
    optimizer.step(as_mapping(model, optimizer, *data("channels last", 0)))
    for parameter in model.parameters():
        assert parameter.grad.stride() == parameter.stride()
