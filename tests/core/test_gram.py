import pytest
import torch
from helpers import flat, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradkit as gk
from gradkit.core.flat import Layout
from gradkit.core.gradients import Gradients
from gradkit.core.gram import (
    BLOCK,
    block_grams,
    cosines,
    exact_products,
    gram,
    inner_products,
    norm,
    product_of_parts,
    squared_norm,
)

LARGE = 24_000_000
CHUNK = 1 << 20


@pytest.fixture(autouse=True, params=[0, 1 << 12], ids=["in blocks", "short at once"])
def short(request, monkeypatch):
    """Up to which length vectors are converted at once; 0 sends all of them through blocks."""
    # Both ways are to give the same, so nothing public tells which was taken.
    monkeypatch.setattr("gradkit.core.gram._SHORT", request.param)


def reference(a, b, *, signs=False):
    """All inner products in float64, chunk by chunk to spare the memory."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for left, right in zip(a.split(CHUNK, dim=1), b.split(CHUNK, dim=1), strict=True):
        left, right = left.double(), right.double()
        if signs:
            left, right = left.sign(), right.sign()
        total += left @ right.T
    return total


def diagonal_error(actual, rows):
    """The largest error in units of the lengths' product."""
    expected = reference(rows, rows)
    lengths = expected.diagonal().sqrt()
    return float(((actual.double() - expected).abs() / torch.outer(lengths, lengths)).max())


@pytest.fixture(scope="module")
def large_rows():
    """Two rows of 24 million numbers whose means are not zero: the sums do not cancel."""
    rows = torch.empty(2, LARGE).normal_(generator=seeded(0))
    rows[0].add_(0.7)
    rows[1].mul_(0.01).sub_(0.02)
    return rows


def test_millions_of_float32_numbers(large_rows):
    result = gram(large_rows)
    assert result.dtype == torch.float64
    assert diagonal_error(result, large_rows) < 1e-6
    assert torch.equal(result, result.T)


def test_the_norm_of_millions_of_numbers(large_rows):
    expected = large_rows[0].split(CHUNK)
    expected = sum(part.double().square().sum() for part in expected).sqrt()
    assert abs(float(norm(large_rows[0])) / float(expected) - 1) < 1e-6


def test_signs_of_millions_of_numbers_are_counted_exactly(large_rows):
    expected = reference(large_rows, large_rows, signs=True)
    assert torch.equal(gram(large_rows, signs=True), expected)


def test_millions_of_bfloat16_numbers(large_rows):
    rows = large_rows.bfloat16()
    result = gram(rows)
    assert result.dtype == torch.float64
    assert diagonal_error(result, rows) < 1e-6
    expected = reference(rows, rows, signs=True)
    assert torch.equal(gram(rows, signs=True), expected)


@pytest.mark.parametrize(
    "length",
    [
        *(1, 2, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 65 * BLOCK, 65 * BLOCK + 7),
        *(32_767, 100_003, 2_000_000),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_length_and_dtype(length, dtype):
    generator = seeded(length)
    rows = (torch.randn(3, length, generator=generator) / 4 + 0.5).to(dtype)
    result = gram(rows)
    assert result.dtype == torch.float64
    assert diagonal_error(result, rows) < (1e-12 if dtype == torch.float64 else 1e-6)
    expected = reference(rows, rows, signs=True)
    assert torch.equal(gram(rows, signs=True).double(), expected)


@pytest.mark.parametrize("length", [5, BLOCK, 2 * BLOCK + 3])
def test_one_row(length):
    row = torch.randn(1, length, generator=seeded(0))
    assert gram(row).shape == (1, 1)
    assert diagonal_error(gram(row), row) < 1e-6
    torch.testing.assert_close(norm(row[0]), gram(row)[0, 0].sqrt(), rtol=0, atol=0)


def test_rows_of_no_length():
    assert gram(torch.empty(2, 0)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("length", [7, BLOCK + 7])
def test_different_rows_left_and_right(length):
    generator = seeded(0)
    a = torch.randn(2, length, generator=generator)
    b = torch.randn(3, length, generator=generator)
    for signs in (False, True):
        result = inner_products(a, b, signs=signs)
        assert result.shape == (2, 3)
        expected = reference(a, b, signs=signs)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(
            inner_products(b, a, signs=signs), result.T, rtol=1e-6, atol=1e-4
        )


def test_rows_that_are_not_contiguous():
    rows = torch.randn(100_003, 6, generator=seeded(0)).T[::2]
    assert diagonal_error(gram(rows), rows) < 1e-6


def test_the_rows_are_only_read():
    rows = torch.randn(2, BLOCK + 5, generator=seeded(0))
    before = rows.clone()
    gram(rows, signs=True)
    gram(rows)
    assert torch.equal(rows, before)


# Scopes.


def test_block_grams_are_the_grams_of_the_blocks():
    rows = torch.randn(3, BLOCK + 40, generator=seeded(0))
    segments = [(0, 5), (5, 30), (30, BLOCK + 40)]
    for signs in (False, True):
        result = block_grams(rows, segments, signs=signs)
        for block, (start, stop) in zip(result, segments, strict=True):
            part = rows[:, start:stop].clone()
            expected = reference(part, part, signs=signs)
            bound = 1e-6 * float(expected.diagonal().max())
            torch.testing.assert_close(block.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("signs", [False, True])
def test_gradients_give_one_gram_for_each_group_or_tensor(signs):
    sizes = [3, 4, 5]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    layout = Layout.of([{"params": parameters[:2]}, {"params": parameters[2:]}])
    rows = torch.randn(2, 12, generator=seeded(0))
    gradients = Gradients(("a", "b"), torch.zeros(2), rows, layout=layout)
    parts = {"global": [12], "group": [7, 5], "tensor": sizes}
    for scope, lengths in parts.items():
        expected = torch.stack(
            [reference(part, part, signs=signs) for part in rows.split(lengths, dim=1)]
        )
        result = gradients.gram(scope, signs=signs)
        torch.testing.assert_close(
            result.double(), expected[0] if scope == "global" else expected, rtol=1e-6, atol=1e-6
        )


def test_a_bare_matrix_has_no_groups():
    gradients = Gradients(("a",), torch.zeros(1), torch.ones(1, 3))
    with pytest.raises(ValueError, match="scope 'tensor' needs to know where the parameters lie"):
        gradients.gram("tensor")


# Cosines.


def test_gsema_example_raw_and_sign_cosine_disagree():
    rows = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    gradients = Gradients(("source", "target"), torch.zeros(2), rows)
    raw = gradients.cosine("source", "target")
    signs = gradients.cosine("source", "target", signs=True)
    assert float(raw) == pytest.approx(-22 / (18 * 38) ** 0.5, abs=1e-6)
    assert float(raw) == pytest.approx(-0.8412, abs=5e-5)
    assert float(signs) == pytest.approx(1 / 3, abs=1e-6)


def test_the_cosine_beside_a_zero_gradient_is_zero():
    rows = torch.tensor([[1.0, 2.0], [0.0, 0.0], [2.0, 4.0]])
    result = cosines(gram(rows))
    assert result[1].tolist() == [0.0, 0.0, 0.0]
    assert result[:, 1].tolist() == [0.0, 0.0, 0.0]
    assert float(result[0, 2]) == pytest.approx(1.0, abs=1e-6)
    both = Gradients(("a", "b"), torch.zeros(2), torch.zeros(2, 3))
    assert float(both.cosine("a", "b")) == 0.0


def test_a_nan_stays_a_nan():
    rows = torch.tensor([[float("nan"), 1.0], [1.0, 1.0]])
    result = cosines(gram(rows))
    assert result[0, 1].isnan()
    assert float(result[1, 1]) == pytest.approx(1.0, abs=1e-6)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31), st.floats(1e-4, 1e4))
def test_cosines_stay_between_minus_one_and_one_and_ignore_lengths(count, length, seed, factor):
    rows = torch.randn(count, length, generator=seeded(seed), dtype=torch.float64)
    rows = torch.cat([rows, -factor * rows])
    result = cosines(gram(rows))
    assert float(result.abs().max()) <= 1.0
    unit = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(result, unit @ unit.T, rtol=0, atol=1e-12)
    opposite = result[range(count), range(count, 2 * count)]
    torch.testing.assert_close(opposite, -torch.ones(count, dtype=torch.float64))


def test_batches_of_gram_matrices():
    rows = torch.randn(5, 3, 4, generator=seeded(0))
    rows[2, 1] = 0
    batch = torch.stack([gram(matrix) for matrix in rows])
    assert torch.equal(cosines(batch), torch.stack([cosines(each) for each in batch]))


# Whatever precision the surroundings have set.


class PrecisionOfProducts(TorchDispatchMode):
    """Notes the dtype and float32 precision of every matrix product that is carried out."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm", "mv", "addmv", "addmm", "dot", "matmul"):
            self.seen.append((args[0].dtype, torch.get_float32_matmul_precision()))
        return function(*args, **(kwargs or {}))


def products(rows):
    gradients = Gradients(tuple("ab"), torch.zeros(2), rows, weights=torch.tensor([2.0, 0.5]))
    return [
        gram(rows), gram(rows, signs=True), norm(rows[0]),
        block_grams(rows, [(0, 9), (9, BLOCK + 9)]), gradients.direction(),
    ]  # fmt: skip


@pytest.mark.parametrize("length", [BLOCK + 9, 2 * BLOCK])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(length, dtype):
    rows = torch.randn(2, max(length, BLOCK + 9), generator=seeded(0))
    expected = products(rows)
    with torch.autocast("cpu", dtype=dtype):
        actual = products(rows)
        assert (rows @ rows.T).dtype == dtype  # still on, and it would have mattered
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_a_lower_matmul_precision_changes_nothing_and_is_put_back(precision):
    rows = torch.randn(2, BLOCK + 9, generator=seeded(0))
    expected = products(rows)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with PrecisionOfProducts() as products_seen:
            actual = products(rows)
        after = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    assert after == precision
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    # Whether this machine has a less precise product at all does not matter: none was asked for.
    assert products_seen.seen
    precisions = {precision for dtype, precision in products_seen.seen if dtype != torch.float64}
    assert precisions == {"highest"}


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no setting by backend"
)
def test_precisions_set_by_backend_are_put_back():
    """Torch's newer setting, by backend, makes the older one unreadable."""
    rows = torch.randn(2, BLOCK + 9, generator=seeded(0))
    expected = products(rows)
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        actual = products(rows)
        after = backend.fp32_precision
    finally:
        backend.fp32_precision = before
    assert after == "bf16"
    assert torch.get_float32_matmul_precision() == "highest"
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def gram_of_mismatched_rows():
    with exact_products(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "highest"
        torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_the_precision_is_put_back_after_an_error():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(RuntimeError, match="shapes"):
            gram_of_mismatched_rows()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_step_under_autocast_takes_the_same_direction():
    """The closure computes in bfloat16; what is made of its gradients does not."""

    def run(autocast):
        model = nn.Linear(4, 3)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=seeded(p.numel())))
        x = torch.randn(8, 4, generator=seeded(9))
        optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), gk.PCGrad(), gk.SAM())

        def loss(target):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return (model(x) - target).square().mean()

        objectives = {"a": lambda: loss(2.0), "b": lambda: loss(-2.0)}
        if autocast:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                optimizer.step(objectives)
        else:
            optimizer.step(objectives)
        return flat(model.parameters()), optimizer.last_step.gram

    for actual, expected in zip(run(True), run(False), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_of_a_vector_in_parts(dtype):
    generator = seeded(5)
    shapes = [(3,), (), (0,), (70, 90), (4096,), (4097,), (2, 640, 10)]
    parts = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    parts.append(torch.zeros(9000, dtype=dtype))
    expected = sum(float(part.double().square().sum()) for part in parts)
    assert float(squared_norm(parts)) == pytest.approx(expected, rel=3e-7)
    assert squared_norm([1e-20 * part for part in parts]) is None
    assert squared_norm([torch.full((5000,), torch.inf, dtype=dtype), *parts]) is None
    assert squared_norm([]) is None


@pytest.mark.parametrize(
    "dtypes", [(torch.float64,), (torch.float32,), (torch.bfloat16, torch.float32)]
)
def test_the_product_of_two_vectors_in_parts(dtypes):
    generator = seeded(6)
    shapes = [(3,), (), (0,), (70, 90), (4096,), (4097,), (2, 640, 10)]
    a, b = (
        [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        for dtype in (dtypes[0], dtypes[-1])
    )
    a[3], b[3] = a[3].t().contiguous().t(), b[3].t()
    b[3] = b[3].reshape(70, 90)
    products = [u.double() * v.double() for u, v in zip(a, b, strict=True)]
    expected = sum(float(product.sum()) for product in products)
    scale = sum(float(product.abs().sum()) for product in products)
    assert float(product_of_parts(a, b)) == pytest.approx(expected, abs=1e-7 * scale)
    assert product_of_parts([1e-20 * part for part in a], [1e-20 * part for part in b]) is None
    assert product_of_parts(a, [part * torch.inf for part in b]) is None
    assert product_of_parts([], []) is None


# Signs.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_signs_of_zeros_and_of_the_smallest_numbers(dtype):
    least = torch.finfo(dtype).smallest_normal
    row = torch.tensor([0.0, -0.0, least, -least, 1.0, torch.inf, -3.0], dtype=dtype)
    other = torch.tensor([1.0, 1.0, least, least, -0.0, 1.0, -least], dtype=dtype)
    result = gram(torch.stack([row, other]).repeat(1, 3), signs=True)
    assert result.tolist() == [[15.0, 6.0], [6.0, 18.0]]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**31))
def test_signs_of_two_rows_in_blocks_of_every_kind(length, dtype, seed):
    """Of elements whose products are 0, underflow, overflow or are NaN, and of ordinary ones."""
    generator = seeded(seed)
    info = torch.finfo(dtype)
    special = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, info.tiny, -info.tiny, info.max]
    values = torch.tensor([*special, -info.max, 1.5, -2.5, 3.0], dtype=dtype)
    first = torch.randint(0, 2, (1,), generator=generator).item() * (len(special) + 1)
    rows = values[torch.randint(first, len(values), (2, length), generator=generator)]
    # Beside the block of ordinary elements, one of the other kind may follow.
    rows = torch.cat([rows, torch.randn(2, 7, generator=generator).to(dtype)], dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradkit.core.gram._PAIR", 7)
        result = gram(rows, signs=True)
    signs = (rows > 0).double() - (rows < 0).double()
    assert torch.equal(result, signs @ signs.T)


def test_signs_of_two_rows_are_those_of_the_rows_beside_a_third():
    rows = torch.randn(3, (1 << 18) + 5, generator=seeded(3))
    rows[:, 70_000:90_000] *= 1e-30  # products underflow
    rows[0, 100_000:100_005] = 0
    rows[1, 7] = torch.nan
    assert torch.equal(gram(rows[:2], signs=True), gram(rows, signs=True)[:2, :2])
    columns = rows.T.contiguous().T
    assert torch.equal(gram(columns[:2], signs=True), gram(rows[:2], signs=True))


@pytest.mark.parametrize("count", [2, 5])
def test_signs_of_several_buffers_of_columns(count, monkeypatch):
    monkeypatch.setattr("gradkit.core.gram._SIGNS", 4 * BLOCK)
    monkeypatch.setattr("gradkit.core.gram._PAIR", 4 * BLOCK)
    rows = torch.randint(-1, 2, (count, 9 * BLOCK + 11), generator=seeded(2)).float()
    assert torch.equal(gram(rows, signs=True), reference(rows, rows))
    left, right = rows[:1], rows[1:]
    assert torch.equal(inner_products(left, right, signs=True), reference(left, right))
