"""Teachers of students that are not all float32: each kind of weight and buffer follows."""

import copy

import pytest
import torch
from helpers import seeded
from torch import nn
from torch.nn.utils import prune

import gradkit as gk
from gradkit.teachers import follow

ENGINES = ["functional", "inplace"]


def wrapped(student, transform, trained=None, lr=0.1, **options):
    parameters = [p for p in student.parameters() if p.requires_grad]
    base = torch.optim.SGD(parameters if trained is None else trained, lr=lr)
    return gk.wrap(base, transform, model=student, **{"engine": "inplace", **options})


def bits(module):
    """Every tensor of a module, bit for bit."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {
        name: (each.dtype, each.shape, each.detach().clone().reshape(-1).view(torch.uint8).tolist())
        for name, each in tensors
    }


X = torch.randn(4, 3, generator=seeded(0))


class Kinds(nn.Linear):
    """A trained layer beside weights and buffers of other kinds."""

    def __init__(self):
        super().__init__(3, 2)
        for name, value in {
            "integers": torch.tensor([1, -2], dtype=torch.int8),
            "flags": torch.tensor([True, False]),
            "waves": torch.tensor([1 + 2j, 3 - 1j]),
            "wide": torch.tensor([1.0, 2.0], dtype=torch.float64),
            "eight": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
        }.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.register_buffer("none", None)
        self.register_buffer("fleeting", torch.zeros(2), persistent=False)
        self.register_buffer("spread", torch.zeros(1).expand(3))
        self.register_buffer("sparse", torch.eye(2).to_sparse())
        self.register_buffer("small", torch.tensor([1.0, 2.0]).to(torch.float8_e5m2))


def gated(student, **arguments):
    return gk.GatedEMA(student, between=("a", "b"), decay_conflict=None, warmup=False, **arguments)


MAKE = {"EMA": lambda student: gk.EMA(student, decay=0.9), "GatedEMA": gated}


def objectives(loss, sign=1.0):
    """Two objectives, aligned or in conflict; EMA does not mind."""
    return {"a": loss, "b": lambda: sign * 0.5 * loss()}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_kind_of_tensor_follows(name, engine):
    student = Kinds()
    transform = MAKE[name](student)
    teacher = transform.teacher
    optimizer = wrapped(student, transform, engine=engine)
    start = student.weight.detach().clone()
    with torch.no_grad():
        student.integers.copy_(torch.tensor([5, 6]))
        student.flags.logical_not_()
        student.waves.mul_(2)
        student.wide.mul_(2)
        student.fleeting.fill_(3.0)
        student.spread = torch.ones(1).expand(3)
        student.sparse = torch.tensor([[0.0, 4.0], [0.0, 0.0]]).to_sparse()
        student.small = torch.tensor([4.0, 0.5]).to(torch.float8_e5m2)
    optimizer.step(objectives(lambda: student(X).square().mean()))
    assert not torch.equal(student.weight, start)
    torch.testing.assert_close(teacher.weight, 0.9 * start + 0.1 * student.weight)
    assert teacher.integers.tolist() == [5, 6]
    assert teacher.flags.tolist() == [False, True]
    torch.testing.assert_close(teacher.waves.data, torch.tensor([1 + 2j, 3 - 1j]) * 1.1)
    # The decay is a float64 number here, so that nothing but the last bit is lost.
    tolerance = 1e-15 if name == "EMA" else 1e-6
    expected = torch.tensor([1.1, 2.2], dtype=torch.float64)
    torch.testing.assert_close(teacher.wide.data, expected, rtol=tolerance, atol=0)
    assert teacher.none is None
    assert teacher.fleeting.tolist() == [3.0, 3.0]
    assert teacher.spread.tolist() == [1.0, 1.0, 1.0]
    assert teacher.sparse.to_dense().tolist() == [[0.0, 4.0], [0.0, 0.0]]
    assert teacher.small.float().tolist() == [4.0, 0.5]
    assert "fleeting" not in teacher.state_dict()


@pytest.mark.parametrize("make", [lambda s: gk.EMA(s, decay=1.0), gated])
def test_a_teacher_that_holds_keeps_everything(make):
    student = Kinds()
    transform = make(student)
    optimizer = wrapped(student, transform)
    kept = bits_of_dense(transform.teacher)
    with torch.no_grad():
        student.integers.add_(1)
        student.flags.logical_not_()
    student.fleeting = torch.ones(7)
    student.none = torch.ones(2)
    student.register_buffer("new", torch.ones(2))
    student.register_parameter("extra", nn.Parameter(torch.ones(2), requires_grad=False))
    optimizer.step(objectives(lambda: student(X).square().mean(), sign=-1.0))
    assert float(optimizer.last_step.decay) == 1.0
    assert bits_of_dense(transform.teacher) == kept
    if isinstance(transform, gk.GatedEMA):
        optimizer.step(objectives(lambda: student(X).square().mean()))
        for name in ("fleeting", "none", "new", "extra", "integers"):
            assert torch.equal(getattr(transform.teacher, name), getattr(student, name)), name


def bits_of_dense(module):
    held = copy.copy(module)
    held._buffers = {k: b for k, b in module._buffers.items() if k not in ("sparse",)}
    return bits(held)


class Cache(nn.Linear):
    """A buffer that takes the input's size."""

    def __init__(self):
        super().__init__(3, 2)
        self.register_buffer("table", torch.zeros(1))

    def forward(self, x):
        if len(self.table) != len(x):
            self.table = torch.arange(float(len(x)))
        return super().forward(x)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_buffer_may_grow_and_shrink(name, engine):
    student = Cache()
    transform = MAKE[name](student)
    optimizer = wrapped(student, transform, engine=engine)
    for size in (4, 2, 2, 3):
        optimizer.step(objectives(lambda size=size: student(X[:size]).square().mean()))
        assert len(student.table) == size
        assert torch.equal(transform.teacher.table, student.table)
        assert transform.teacher.table.data_ptr() != student.table.data_ptr()


def test_buffers_appear_vanish_become_none_and_change_dtype():
    student = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    student[0].register_buffer("count", torch.zeros(2, dtype=torch.int64))
    student[0].register_buffer("real", torch.zeros(2))
    ema = gk.EMA(student, decay=0.9)
    optimizer = wrapped(student, ema)

    def step():
        optimizer.step(lambda: student(X).square().mean())
        mine, theirs = dict(ema.teacher.named_buffers()), dict(student.named_buffers())
        assert mine.keys() == theirs.keys()
        for name, buffer in mine.items():
            assert buffer.dtype == theirs[name].dtype, name
            assert torch.equal(buffer, theirs[name]), name
        assert ema.teacher.state_dict().keys() == student.state_dict().keys()

    student[0].count = torch.tensor([0.5, 1.5])
    step()
    student[0].real = torch.tensor([1 / 3], dtype=torch.float64)
    step()
    student[1].register_buffer("late", torch.ones(3))
    student[1].register_buffer("fleeting", torch.ones(3), persistent=False)
    step()
    student[1].late = None
    step()
    assert "late" in ema.teacher[1]._buffers
    del student[1].late
    step()
    assert "late" not in ema.teacher[1]._buffers


def test_the_teachers_own_dtype_of_a_buffer_stays():
    student = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).bfloat16()
    teacher = copy.deepcopy(student).float().requires_grad_(False)
    ema = gk.EMA(student, teacher, decay=0.9)
    optimizer = wrapped(student, ema)
    start = teacher[0].weight.clone()
    optimizer.step(lambda: student(X.bfloat16()).square().mean())
    assert {each.dtype for each in teacher.parameters()} == {torch.float32}
    assert teacher[1].running_mean.dtype == torch.float32
    assert torch.equal(teacher[1].running_mean, student[1].running_mean.float())
    expected = start.lerp(student[0].weight.detach().float(), 1 - 0.9)
    assert torch.equal(teacher[0].weight, expected)


def test_a_buffer_that_shows_a_weight_follows_with_it():
    student = nn.Linear(3, 2)
    student.register_buffer("shown", student.weight.detach().t())
    ema = gk.EMA(student, decay=0.9)
    optimizer = wrapped(student, ema)
    start = student.weight.detach().clone()
    optimizer.step(lambda: student(X).square().mean())
    expected = 0.9 * start + 0.1 * student.weight
    torch.testing.assert_close(ema.teacher.weight.data, expected.data)
    assert torch.equal(ema.teacher.shown, ema.teacher.weight.t())


# Parameters that come, go or are shared.


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3))

    def forward(self, x):
        x = self.layers(x)
        return x * self.scale if hasattr(self, "scale") else x


def test_parameters_and_modules_that_appear_are_copied():
    student = Growing()
    ema = gk.EMA(student, decay=0.9)
    optimizer = wrapped(student, ema)

    def loss():
        return student(X).square().mean()

    optimizer.step(loss)
    student.scale = nn.Parameter(torch.full((3,), 2.0))
    student.layers.extend([nn.Tanh(), nn.BatchNorm1d(3), nn.Linear(3, 3)])
    student.layers[-1].weight = student.layers[0].weight
    optimizer.add_param_group({"params": [student.scale, student.layers[-1].bias]})
    optimizer.step(loss)
    teacher = ema.teacher
    for mine, theirs in ((teacher.scale, student.scale), (teacher.layers[3].bias,) * 2):
        assert torch.equal(mine, theirs)
        assert not mine.requires_grad
    assert torch.equal(teacher.scale, student.scale)
    assert torch.equal(teacher.layers[2].running_mean, student.layers[2].running_mean)
    assert teacher.layers[3].weight is teacher.layers[0].weight
    assert [type(each) for each in teacher.layers] == [type(each) for each in student.layers]
    before = teacher.scale.detach().clone()
    optimizer.step(loss)
    torch.testing.assert_close(teacher.scale.data, (0.9 * before + 0.1 * student.scale).data)
    assert teacher(X).shape == (4, 3)


def test_what_was_none_may_become_a_module_or_a_parameter():
    student = nn.Linear(3, 2)
    student.head = student.scale = None
    ema = gk.EMA(student, decay=0.5)
    optimizer = wrapped(student, ema)
    student.head, student.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    optimizer.step(lambda: (student.head(student(X)) * student.scale).square().mean())
    assert bits(ema.teacher.head) == bits(student.head)
    assert torch.equal(ema.teacher.scale, student.scale)
    assert not any(each.requires_grad for each in ema.teacher.parameters())


def resized(student):
    student.bias = nn.Parameter(torch.zeros(5))


def pruned(student):
    prune.l1_unstructured(student, "weight", amount=0.5)


def without_bias(student):
    student.bias = None


def untied(student):
    student.twin = nn.Parameter(torch.zeros(2, 3))


def into_complex(student):
    student.other = nn.Parameter(torch.zeros(2, dtype=torch.complex64), requires_grad=False)


IMPOSSIBLE = {
    "another shape": (resized, r"the shape of 'bias' is \(2,\) in the teacher and \(5,\)"),
    "pruned": (pruned, "has a parameter 'weight' and the student has none of that name any more"),
    "gone": (without_bias, "has a parameter 'bias' and the student has none"),
    "tied no more": (untied, "'weight' and 'twin' are one in the teacher and two in the student"),
    "complex": (into_complex, r"'other' is torch\.float32 in the teacher, which cannot hold"),
}


class Tied(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.twin = self.weight
        self.other = nn.Parameter(torch.zeros(2), requires_grad=False)


@pytest.mark.parametrize("case", IMPOSSIBLE)
@pytest.mark.parametrize("name", MAKE)
def test_what_cannot_follow_is_refused_before_the_student_moves(name, case):
    change, message = IMPOSSIBLE[case]
    student = Tied()
    trained = nn.Parameter(torch.ones(()))
    student.register_parameter("trained", trained)
    transform = MAKE[name](student)
    optimizer = wrapped(student, transform, [trained])
    change(student)
    before, kept = bits(student), bits(transform.teacher)
    rng = torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step(objectives(lambda: trained.square() * torch.rand(()) + trained))
    assert bits(student) == before
    assert bits(transform.teacher) == kept
    assert torch.equal(torch.get_rng_state(), rng)
    assert trained.grad is None
    assert not any(transform.state.values())
    assert optimizer.last_step is None


@pytest.mark.parametrize("name", MAKE)
def test_shared_weights_follow_once(name):
    student = Tied()
    transform = MAKE[name](student)
    assert transform.teacher.twin is transform.teacher.weight
    start = student.weight.detach().clone()
    optimizer = wrapped(student, transform)
    optimizer.step(objectives(lambda: student(X).square().mean()))
    expected = 0.9 * start + 0.1 * student.weight
    torch.testing.assert_close(transform.teacher.weight.data, expected.data)


def test_a_given_teacher_need_not_share_what_the_student_shares():
    student = Tied()
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher.twin = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
    optimizer = wrapped(student, gk.EMA(student, teacher, decay=0.5))
    optimizer.step(lambda: student(X).square().mean())
    torch.testing.assert_close(teacher.twin.data, 0.5 * student.weight.data)


def test_a_frozen_part_may_be_shared_with_the_teacher_and_a_trained_one_may_not():
    student = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2))
    teacher = nn.Sequential(student[0], copy.deepcopy(student[1]).requires_grad_(False))
    optimizer = wrapped(student, gk.EMA(student, teacher, decay=0.5))
    kept, start = bits(student[0]), teacher[1].weight.clone()
    optimizer.step(lambda: student(X).square().mean())
    assert bits(student[0]) == kept
    torch.testing.assert_close(teacher[1].weight, 0.5 * start + 0.5 * student[1].weight.data)
    with pytest.raises(ValueError, match=r"share the memory of '0\.weight'"):
        gk.EMA(nn.Sequential(student[1]), nn.Sequential(student[1]), decay=0.5)


def test_a_failure_while_changes_are_prepared_leaves_the_teacher_as_it_was(monkeypatch):
    teacher, student = Cache(), Cache()
    kept = bits(teacher)

    class Broken(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.to:
                raise MemoryError
            return super().__torch_function__(function, types, args, kwargs or {})

    student.table = torch.zeros(9).as_subclass(Broken)
    with pytest.raises(MemoryError):
        follow(teacher, student, torch.tensor(0.5))
    assert bits(teacher) == kept


# Half precision.


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_in_half_precision_is_the_rounded_average(name, dtype):
    student = nn.Linear(8, 8).to(dtype)
    transform = (
        gk.EMA(student, decay=0.999)
        if name == "EMA"
        else gk.GatedEMA(student, between=("a", "b"), decay_aligned=0.999, warmup=False)
    )
    optimizer = wrapped(student, transform, lr=0.0)
    start = student.weight.detach().clone()
    with torch.no_grad():
        student.weight.mul_(1.5)
    expected = start.float()
    for _ in range(50):
        optimizer.step(objectives(lambda: student.weight.sum() + student.bias.sum()))
        expected.lerp_(student.weight.detach().float(), 1 - 0.999)
    assert torch.equal(transform.teacher.weight, expected.to(dtype))
    # Each number has moved by about 2.4%, more than the spacing of either format.
    assert (transform.teacher.weight != start).all()


def test_what_somebody_writes_to_a_half_precision_teacher_counts():
    student = nn.Linear(3, 2).bfloat16()
    ema = gk.EMA(student, decay=0.999)
    optimizer = wrapped(student, ema, lr=0.0)
    optimizer.step(lambda: student(X.bfloat16()).square().mean())
    ema.teacher.weight.data.fill_(4.0)
    optimizer.step(lambda: student(X.bfloat16()).square().mean())
    expected = torch.full((2, 3), 4.0).lerp(student.weight.detach().float(), 1 - 0.999)
    assert torch.equal(ema.teacher.weight, expected.bfloat16())
    assert torch.equal(optimizer.state[student.weight]["gradkit.0:shadow.weight"], expected)


def test_no_shadow_is_kept_of_a_frozen_copy():
    student = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2)).bfloat16()
    ema = gk.EMA(student, decay=0.9)
    optimizer = wrapped(student, ema)
    kept = bits(student[0])
    for _ in range(2):
        optimizer.step(lambda: student(X.bfloat16()).square().mean())
    kept_of = [key for state in optimizer.state.values() for key in state if ":shadow." in key]
    assert kept_of == ["gradkit.0:shadow.1.weight", "gradkit.0:shadow.1.bias"]
    assert bits(ema.teacher[0]) == kept


# What buffers do.


class Counting(nn.Module):
    """Buffers of several kinds; `twice` and `again` are one tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("short", torch.zeros(2, dtype=torch.bfloat16))
        self.register_buffer("grows", torch.zeros(1))
        self.inner = nn.Module()
        self.inner.register_buffer("twice", torch.zeros(1))
        self.register_buffer("again", self.inner.twice)


@pytest.mark.parametrize("name", MAKE)
def test_averaged_and_skipped_buffers(name):
    make = {
        "EMA": lambda student, buffers: gk.EMA(student, decay=0.75, buffers=buffers),
        "GatedEMA": lambda student, buffers: gk.GatedEMA(
            student, between=("a", "b"), decay_aligned=0.75, warmup=False, buffers=buffers
        ),
    }[name]
    found = {}
    for buffers in ("copy", "average", "skip"):
        student = Counting()
        transform = make(student, buffers)
        optimizer = wrapped(student, transform)

        def grown(student=student):
            with torch.no_grad():
                student.mean.add_(4.0)
                student.count.add_(1)
                student.short.add_(8.0)
                student.inner.twice.add_(4.0)
                student.grows = torch.ones(len(student.grows) + 1)
            return student.weight

        for _ in range(2):
            optimizer.step({"a": grown, "b": lambda student=student: student.weight})
        found[buffers] = {key: each.tolist() for key, each in transform.teacher.named_buffers()}
    assert found["skip"] == {key: each.tolist() for key, each in Counting().named_buffers()}
    assert found["copy"]["mean"] == [8.0, 8.0]
    assert found["copy"]["count"] == 2
    # 1/4 of 4, then 3/4 of that and 1/4 of 8.
    expected = {"mean": [2.75, 2.75], "inner.twice": [2.75], "again": [2.75]}
    rest = {key: found["copy"][key] for key in ("count", "short", "grows")}
    assert {key: found["average"][key] for key in found["average"]} == {
        key: {**expected, **rest}[key] for key in found["average"]
    }
