"""Networks of many kinds, the forms of objectives, and runs in both engines."""

import itertools

import torch
from helpers import flat, relative_error, seeded
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

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


def optimizer_of(model, *transforms, engine, lr=0.1, **options):
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = torch.optim.SGD(trainable, lr=lr)
    return gk.wrap(base, *transforms, model=model, engine=engine, **options), Layout.of(
        base.param_groups
    )
