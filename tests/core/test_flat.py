import gc
import itertools

import pytest
import torch
from helpers import as_users_run_it, seeded
from torch import nn

import gradkit as gk
from gradkit.core.flat import Layout, Pool, are_unshared


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.zeros(shape, dtype=dtype))


def layout_of(*groups):
    return Layout.of([{"params": list(group)} for group in groups])


# Layout.


def test_parameters_keep_the_order_of_the_groups():
    a, b, c = parameter(2, 3), parameter(4), parameter(1)
    layout = layout_of([c, a], [b])
    assert [id(p) for p in layout.parameters] == [id(c), id(a), id(b)]
    assert layout.groups == (0, 0, 1)
    assert layout.offsets == (0, 1, 7, 11)
    assert layout.numel == 11


def test_segments():
    layout = layout_of([parameter(1), parameter(2, 3)], [parameter(4)])
    assert layout.segments("global") == ((0, 11),)
    assert layout.segments("group") == ((0, 7), (7, 11))
    assert layout.segments("tensor") == ((0, 1), (1, 7), (7, 11))
    with as_users_run_it(), pytest.raises(ValueError, match=r"scope is 'layer'.*global, group, te"):
        layout.segments("layer")


def test_a_group_without_trainable_parameters_has_no_segment():
    frozen = parameter(3).requires_grad_(False)
    layout = layout_of([parameter(2)], [frozen], [parameter(4)])
    assert layout.groups == (0, 2)
    assert layout.segments("group") == ((0, 2), (2, 6))


def test_frozen_parameters_are_left_out():
    frozen, free = parameter(3).requires_grad_(False), parameter(2)
    layout = layout_of([frozen, free])
    assert [id(p) for p in layout.parameters] == [id(free)]
    assert layout.numel == 2


def test_a_tied_parameter_is_there_once():
    encoder, decoder = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    decoder.weight = encoder.weight
    model = nn.Sequential(encoder, decoder)
    layout = Layout.of(torch.optim.SGD(model.parameters(), lr=0.1).param_groups)
    assert layout.numel == 15
    assert [id(p) for p in layout.parameters] == [id(encoder.weight)]


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float64, torch.float32), torch.float64),
    ],
)
def test_the_dtype_loses_nothing(dtypes, expected):
    layout = layout_of([parameter(2, dtype=dtype) for dtype in dtypes])
    assert layout.dtype == expected
    assert layout.flatten([p.detach() for p in layout.parameters]).dtype == expected


def test_flatten_and_views_are_inverse():
    shapes = [(2, 3), (), (4,), (2, 1, 2, 2)]
    layout = layout_of([parameter(*shape) for shape in shapes])
    generator = seeded(0)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    vector = layout.flatten(tensors)
    assert vector.shape == (19,)
    for view, tensor in zip(layout.views(vector), tensors, strict=True):
        torch.testing.assert_close(view, tensor, rtol=0, atol=0)
    torch.testing.assert_close(vector, torch.cat([t.reshape(-1) for t in tensors]), rtol=0, atol=0)
    assert torch.equal(layout.flatten(layout.views(vector)), vector)


def test_views_alias_the_vector():
    layout = layout_of([parameter(2, 3), parameter(4)])
    vector = torch.zeros(10)
    for number, view in enumerate(layout.views(vector), start=1):
        view.fill_(number)
    assert vector.tolist() == [1.0] * 6 + [2.0] * 4


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((2, 3, 4, 5), torch.channels_last), ((2, 3, 2, 4, 5), torch.channels_last_3d)],
)
def test_channels_last_views_alias_and_keep_the_memory_format(shape, memory_format):
    first = parameter(3)
    weight = nn.Parameter(torch.zeros(shape).contiguous(memory_format=memory_format))
    layout = layout_of([first, weight, parameter(2)])
    values = torch.randn(shape, generator=seeded(0))
    vector = layout.flatten([torch.ones(3), values, torch.full((2,), 2.0)])
    view = layout.views(vector)[1]
    assert torch.equal(view, values)
    assert view.stride() == weight.stride()
    assert view.is_contiguous(memory_format=memory_format)
    # The view covers its own stretch of the vector, no more and no less.
    view.fill_(7.0)
    inside = values.numel()
    expected = [1.0] * 3 + [7.0] * inside + [2.0] * 2
    assert vector.tolist() == expected


def test_other_strides_fall_back_to_contiguous_views():
    weight = nn.Parameter(torch.zeros(4, 3).T)
    layout = layout_of([weight])
    values = torch.arange(12.0).view(3, 4)
    assert torch.equal(layout.views(layout.flatten([values]))[0], values)


class Total(gk.Transform):
    """Steps along the sum of all gradients so far."""

    def initial_vectors(self, layout):
        return {"total": torch.zeros(layout.numel, dtype=layout.dtype)}

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            total = self.vectors["total"] + gradients.direction()
            context.propose(self, total=total)
            return gradients.replace(update=total)

        return oracle


def test_what_a_transform_remembers_moves_with_the_parameters():
    """Through a change of memory format, new parameters, a wider dtype and a frozen parameter."""
    model = nn.Conv2d(3, 2, 2)
    more = nn.Linear(2, 3)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.0), Total())
    slopes = {
        parameter: torch.randn(parameter.shape, generator=seeded(seed))
        for seed, parameter in enumerate([*model.parameters(), *more.parameters()])
    }

    def step(**times):
        """The gradient of each parameter is its slope, so the total says how often it was added."""
        modules = {"weight": model.weight, "bias": model.bias, "more": more.weight}
        parameters = [modules[name] for name in times]
        optimizer.step(lambda: sum((slopes[p] * p).sum() for p in parameters))
        for p, count in zip(parameters, times.values(), strict=True):
            torch.testing.assert_close(p.grad, count * slopes[p].to(p.dtype))

    step(weight=1, bias=1)
    model.to(memory_format=torch.channels_last)
    step(weight=2, bias=2)
    optimizer.add_param_group({"params": [more.weight]})
    step(weight=3, bias=3, more=1)
    more.double()
    step(weight=4, bias=4, more=2)
    model.weight.requires_grad_(False)
    step(bias=5, more=3)
    model.to(memory_format=torch.contiguous_format)
    step(bias=6, more=4)


@pytest.mark.parametrize("engine", ["functional", "inplace"])
def test_a_model_may_become_channels_last_between_steps(engine):
    model = nn.Conv2d(3, 2, 2)
    x = torch.randn(2, 3, 4, 4, generator=seeded(0))
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.0), gk.Sum(), model=model, engine=engine
    )
    expected = torch.autograd.grad(
        model(x).square().mean() + model(x).mean(), [*model.parameters()]
    )
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        model.to(memory_format=memory_format)
        optimizer.step({"a": lambda: model(x).square().mean(), "b": lambda: model(x).mean()})
        for p, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient)


def test_same_as_compares_objects_and_places():
    a, b = parameter(2), parameter(2)
    assert layout_of([a, b]).same_as(layout_of([a, b]))
    for other in ([[b, a]], [[a], [b]], [[a]], [[a, parameter(2)]]):
        assert not layout_of([a, b]).same_as(layout_of(*other))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[parameter(1)], [parameter(1), parameter(2, dtype=torch.complex64)]], "parameter 1 of group 1 is complex"),  # noqa: E501
        ([[nn.Parameter(torch.zeros(2, device="meta"))]], "parameter 0 of group 0 is on the meta"),
        ([[nn.Parameter(torch.zeros(2, device="meta")), parameter(2)]], "on the meta device"),
    ],
)  # fmt: skip
def test_errors_name_the_parameter(groups, message):
    with pytest.raises(ValueError, match=message):
        layout_of(*groups)


def test_a_lazy_parameter_is_refused():
    lazy = nn.parameter.UninitializedParameter()
    with pytest.raises(ValueError, match="parameter 0 of group 0 is not initialised yet"):
        layout_of([lazy])


# Pool.


def pool_of(length=6):
    return Pool(layout_of([parameter(2, 2), parameter(length - 4)]))


def test_the_pool_reuses_what_nobody_holds():
    pool = pool_of()
    rows, _ = pool.take(3)
    address = rows.data_ptr()
    del rows
    for _ in range(3):
        rows, _ = pool.take(3)
        assert rows.data_ptr() == address
        del rows, _


def test_the_rows_and_their_views_are_the_same_memory():
    pool = pool_of()
    rows, views = pool.take(2)
    assert rows.shape == (2, 6)
    for row, parts in zip(rows, views, strict=True):
        for number, part in enumerate(parts):
            part.fill_(number)
        assert row.tolist() == [0.0] * 4 + [1.0] * 2


@pytest.mark.parametrize(
    "hold",
    {
        "the rows": lambda rows: rows,
        "a row": lambda rows: rows[1],
        "a slice": lambda rows: rows[:, 2:3],
        "a detached view": lambda rows: rows[0].detach(),
        "a view of another shape": lambda rows: rows.T.unsqueeze(0),
        "an expanded view": lambda rows: rows[0, 0].expand(4),
        "a numpy array": lambda rows: rows.numpy(),
        "a graph": lambda rows: torch.ones(6, requires_grad=True) * rows[0],
    }.items(),
    ids=lambda item: item[0].replace(" ", "-"),
)
def test_the_pool_never_hands_out_held_memory(hold):
    pool = pool_of()
    rows, _ = pool.take(2)
    address = rows.data_ptr()
    held = hold[1](rows)
    del rows, _
    other, _ = pool.take(2)
    assert other.data_ptr() != address
    del held
    again, _ = pool.take(2)
    assert again.data_ptr() == address


def test_the_pool_keeps_what_evaluations_needed_beside_the_last_gradient():
    pool, grad, addresses = pool_of(), None, []
    for _ in range(6):
        pool.trim()
        displaced = pool.take_vector()
        pool.note_use()
        addresses.append(displaced.data_ptr())
        del displaced
        grad = pool.take_vector()  # the one before is referenced until now
        addresses.append(grad.data_ptr())
    assert grad is not None
    assert len(set(addresses)) == 2


def test_the_pool_frees_what_only_directions_needed():
    pool = pool_of()
    grad = pool.take_vector()
    before = bytes_of_tensors()
    for _ in range(6):
        pool.trim()
        pool.note_use()  # the gradient only
        grad = pool.take_vector()
        assert bytes_of_tensors() <= 2 * before  # it and the one before
        pool.trim()
        assert bytes_of_tensors() == before
    del grad


def test_a_gradient_keeps_its_memory():
    pool = pool_of(length=5)
    weight, bias = pool.layout.parameters
    vector = pool.take_vector()
    address = vector.data_ptr()
    vector.fill_(1.0)
    weight.grad, bias.grad = pool.layout.views(vector)
    del vector
    for _ in range(3):
        other = pool.take_vector()
        assert other.data_ptr() != address
        other.fill_(-1.0)
        del other
    assert weight.grad.eq(1).all()
    weight.grad = None
    assert pool.take_vector().data_ptr() != address  # the bias still has its part
    bias.grad = None
    assert address in {v.data_ptr() for v in [pool.take_vector(), pool.take_vector()]}


def test_buffers_of_other_sizes_are_kept_apart():
    pool = pool_of()
    taken = [pool.take(count)[0] for count in (1, 2, 2, 3)]
    for a, b in itertools.combinations(taken, 2):
        a.fill_(1.0)
        b.fill_(2.0)
        assert a.eq(1).all()
    assert [len(rows) for rows in taken] == [1, 2, 2, 3]


def test_single_vectors_are_kept_for_some_steps():
    """A transform that acts in every k-th step finds its memory; rows are freed at once."""
    pool = pool_of()
    address = pool.take_vector().data_ptr()
    pool.take(2)
    for _ in range(10):
        pool.trim()
    assert [len(buffers) for buffers in pool._buffers.values()] == [1, 0]
    assert pool.take_vector().data_ptr() == address
    for _ in range(12):
        pool.trim()
    assert not any(pool._buffers.values())


def bytes_of_tensors():
    """The memory of all tensors that there are."""
    gc.collect()
    tensors = [it for it in gc.get_objects() if type(it) in (torch.Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_old_gradients_never_change_and_memory_does_not_grow():
    model = nn.Linear(3, 2)
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), gk.PCGrad(), gk.SAM(), model=model
    )
    x = torch.randn(4, 3, generator=seeded(0))
    objectives = {
        "a": lambda: model(x).square().mean(),
        "b": lambda: (model(x) - 1).square().mean(),
    }
    kept, copies = [], []
    for _ in range(4):
        gradients = optimizer.gradients(objectives)
        kept.append((gradients.rows, gradients.direction()))
        copies.append(tuple(tensor.clone() for tensor in kept[-1]))
        optimizer.step(objectives)
        kept.append(tuple(p.grad for p in model.parameters()))
        copies.append(tuple(tensor.clone() for tensor in kept[-1]))
    for old, copy in zip(kept, copies, strict=True):
        for tensor, expected in zip(old, copy, strict=True):
            assert torch.equal(tensor, expected)
    del kept, old, tensor, gradients
    model.zero_grad()
    # With nothing held, a step finds all the memory it needs in the pool, and in time frees more.
    optimizer.step(objectives)
    bytes_after = []
    for _ in range(12):
        optimizer.step(objectives)
        bytes_after.append(bytes_of_tensors())
    assert bytes_after == sorted(bytes_after, reverse=True)
    assert len(set(bytes_after[-3:])) == 1


KEPT = []


class Returns(torch.autograd.Function):
    """Its gradient is what `make` returns."""

    @staticmethod
    def forward(ctx, weight, make):
        ctx.make = make
        return weight.sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.make(), None


def kept():
    KEPT.append(torch.ones(3, 2))
    return KEPT[-1]


@pytest.mark.parametrize(
    ("make", "unshared"),
    [
        (lambda: torch.ones(3, 2), True),
        (lambda: torch.ones(2, 3).t(), True),
        (kept, False),
        (lambda: kept().t().t(), False),
        (lambda: torch.stack([kept(), kept()])[0], True),
        (lambda: kept().unsqueeze(0)[0], False),
    ],
)
def test_a_gradient_that_someone_else_can_see_is_shared(make, unshared):
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    found = are_unshared(list(torch.autograd.grad(Returns.apply(weight, make), [weight])))
    assert found == unshared  # pytest would hold on to what is in the assertion


@pytest.mark.parametrize("layer", [torch.nn.Linear(3, 2), torch.nn.Conv1d(3, 2, 1)])
def test_gradients_of_layers_are_unshared(layer):
    loss = layer(
        torch.ones(4, 3, 1).squeeze(-1) if layer.weight.dim() == 2 else torch.ones(4, 3, 1)
    )
    found = are_unshared(list(torch.autograd.grad(loss.square().mean(), [*layer.parameters()])))
    assert found


@pytest.mark.parametrize("make", [kept, lambda: kept().t().t()])
def test_a_step_never_hands_out_what_a_closure_keeps(make):
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = gk.wrap(
        torch.optim.SGD([weight], lr=1.0, momentum=0.9, nesterov=True, foreach=True)
    )
    optimizer.step(lambda: Returns.apply(weight, make))
    optimizer.step(lambda: Returns.apply(weight, make))
    weight.grad.mul_(2)
    assert all(torch.equal(one, torch.ones(3, 2)) for one in KEPT)


def test_one_tensor_as_the_gradient_of_two_parameters_is_not_handed_to_both():
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = gk.wrap(torch.optim.SGD([a, b], lr=1.0))
    optimizer.step(lambda: ((a + b) * torch.tensor([1.0, 2.0])).sum())
    a.grad.mul_(10)
    assert b.grad.tolist() == [1, 2]
