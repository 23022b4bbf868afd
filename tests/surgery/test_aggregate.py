import copy
import dataclasses

import pytest
import torch
import torchjd.aggregation
from helpers import CONFLICT, Observed, Weighted, as_users_run_it, seeded
from torch import nn

import gradkit as gk
from gradkit.core.context import Context
from gradkit.core.flat import Layout, Pool
from surgery.rule_steps import in_blocks, step_with

ROWS = torch.randn(3, 10, generator=seeded(0), dtype=torch.float64)
PREFERENCE = torch.tensor([1.0, 0.5, 2.0])  # float32, whatever the gradients are

AGGREGATORS = {
    "AlignedMTL": {},
    "CAGrad": {"c": 0.5},
    "ConFIG": {},
    "Constant": {"weights": PREFERENCE.double()},
    "DualProj": {},
    "ExcessMTL": {},
    "FairGrad": {"alpha": 1.0},
    "GradDrop": {},
    "GradVac": {},
    "IMTLG": {},
    "Krum": {"n_byzantine": 0},
    "Mean": {},
    "MGDA": {},
    "NashMTL": {"n_tasks": 3},
    "PCD": {},
    "PCGrad": {},
    "Random": {},
    "Sum": {},
    "TrimmedMean": {"trim_number": 1},
    "UPGrad": {},
}
OF_THE_GRAM_MATRIX = [
    *("AlignedMTL", "CAGrad", "DualProj", "FairGrad", "GradVac", "IMTLG", "Krum", "MGDA", "PCD"),
    *("PCGrad", "UPGrad"),
]
# These weight gradients by the gradients themselves, or by products of two batches.
OTHER_WEIGHTINGS = ["Constant", "CRMOGM", "ExcessMTL", "Mean", "MoDo", "Random", "SDMGrad", "Sum"]
BASES = ["Aggregator", "GramianWeightedAggregator", "WeightedAggregator", "Weighting"]
# Those whose memory depends on the number of columns, and one that takes seconds.
NOT_BY_BLOCK = ["ExcessMTL", "NashMTL"]


def made(name, **arguments):
    return getattr(torchjd.aggregation, name)(**arguments)


def seeded_call(function, *arguments):
    """TorchJD draws from the global generator."""
    torch.manual_seed(3)
    return function(*arguments)


def test_all_of_torchjd_is_here():
    weightings = [f"{name}Weighting" for name in (*OF_THE_GRAM_MATRIX, *OTHER_WEIGHTINGS)]
    assert {*AGGREGATORS, *weightings, *BASES} == set(torchjd.aggregation.__all__)


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")
@pytest.mark.parametrize("name", AGGREGATORS)
def test_torchjds_aggregators(name):
    arguments = AGGREGATORS[name]
    rule = gk.Aggregate(made(name, **arguments))
    assert rule.works_on == ("gram" if name in OF_THE_GRAM_MATRIX else "rows")
    expected = seeded_call(made(name, **arguments), ROWS)
    torch.testing.assert_close(seeded_call(rule, ROWS), expected)
    rule = gk.Aggregate(made(name, **arguments))
    direction, record = seeded_call(step_with, ROWS, rule)
    torch.testing.assert_close(direction, expected)
    if rule.works_on == "gram":
        torch.testing.assert_close(record.weights @ ROWS, expected)
        rule = gk.Aggregate(made(name, **arguments), of="rows")
        assert rule.works_on == "rows"
        torch.testing.assert_close(seeded_call(rule, ROWS), expected)


@pytest.mark.parametrize("name", [name for name in AGGREGATORS if name not in NOT_BY_BLOCK])
def test_torchjds_aggregators_by_tensor(name):
    arguments = AGGREGATORS[name]
    expected = seeded_call(in_blocks, ROWS, "tensor", made(name, **arguments))
    rule = gk.Aggregate(made(name, **arguments), scope="tensor")
    direction, _ = seeded_call(step_with, ROWS, rule)
    torch.testing.assert_close(direction, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OF_THE_GRAM_MATRIX)
def test_torchjds_gramian_weightings(name):
    arguments = AGGREGATORS[name]
    gram = ROWS @ ROWS.T
    expected = seeded_call(made(f"{name}Weighting", **arguments), gram)
    rule = gk.Aggregate(made(f"{name}Weighting", **arguments))
    assert rule.works_on == "gram"
    torch.testing.assert_close(seeded_call(rule.weights, gram), expected)
    rule = gk.Aggregate(made(name, **arguments))
    torch.testing.assert_close(seeded_call(rule.weights, gram), expected)
    rule = gk.Aggregate(made(f"{name}Weighting", **arguments))
    direction, _ = seeded_call(step_with, ROWS, rule, gk.Sum())
    torch.testing.assert_close(direction, expected @ ROWS)


@pytest.mark.parametrize("name", ["AlignedMTL", "DualProj", "UPGrad", "ConFIG"])
def test_preferences_in_the_gradients_dtype(name):
    """The Gram matrix comes in it too, so that both can be multiplied."""
    rows = ROWS.float()
    expected = made(name, pref_vector=PREFERENCE)(rows)
    rule = gk.Aggregate(made(name, pref_vector=PREFERENCE))
    direction, _ = step_with(rows, rule)
    torch.testing.assert_close(direction, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rule(rows), expected, rtol=1e-4, atol=1e-4)
    if rule.works_on == "gram":
        # TorchJD's solvers know no bfloat16.
        assert rule(rows.bfloat16()).dtype == torch.bfloat16


def test_weightings_of_gradients_say_what_is_wrong():
    rule = gk.Aggregate(torchjd.aggregation.MeanWeighting())
    with pytest.raises(ValueError, match=r"shape \[3\].*of shape \[10\]; if it gives weights for"):
        rule(ROWS)
    rule = gk.Aggregate(torchjd.aggregation.MeanWeighting(), of="gram")
    torch.testing.assert_close(rule(ROWS), ROWS.mean(0))


def test_functions_of_ones_own():
    assert gk.Aggregate(lambda rows: rows.amax(0))(torch.tensor(CONFLICT)).tolist() == [6, 1, 1]
    inverse = gk.Aggregate(lambda gram: 1 / gram.diagonal(), of="gram")
    squares = torch.tensor([[1.0, 4.0], [2.0, 8.0]])
    assert inverse.weights(torch.diag_embed(squares)).tolist() == [[1, 0.25], [0.5, 0.125]]


def observed_step(function, scope="global", of="rows"):
    rule = gk.Aggregate(function, of=of, scope=scope)
    return step_with(ROWS, Weighted(a=2.0, b=-1.0), Observed("c"), rule)


SEEN = torch.stack([2 * ROWS[0], -ROWS[1]])


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_functions_see_the_weighted_rows_of_nonzero_weight(scope):
    seen = []

    def largest(rows):
        seen.append(rows.clone())
        return rows.amax(0)

    direction, _ = observed_step(largest, scope)
    torch.testing.assert_close(torch.cat(seen, dim=1), SEEN)
    assert torch.equal(direction, SEEN.amax(0))
    assert len(seen) == {"global": 1, "group": 2, "tensor": 4}[scope]
    seen.clear()

    def second(gram):
        seen.append(gram.clone())
        return gram.new_tensor([0.0, 1.0])

    direction, _ = observed_step(second, scope, of="gram")
    torch.testing.assert_close(direction, SEEN[1])
    sizes = {"global": [10], "group": [4, 6], "tensor": [3, 1, 4, 2]}[scope]
    for gram, part in zip(seen, SEEN.split(sizes, dim=1), strict=True):
        torch.testing.assert_close(gram, part @ part.T)


def test_functions_may_write_to_what_they_get():
    def careless(rows):
        first = rows[0]
        rows *= 2
        return first

    before = ROWS.clone()
    assert torch.equal(gk.Aggregate(careless)(ROWS), 2 * ROWS[0])
    assert torch.equal(before, ROWS)
    direction, record = step_with(ROWS, gk.Aggregate(careless))
    assert torch.equal(direction, 2 * ROWS[0])
    torch.testing.assert_close(record.gram, ROWS @ ROWS.T)
    gram = ROWS @ ROWS.T
    kept = gram.clone()
    gk.Aggregate(lambda matrix: matrix.fill_(1.0)[0], of="gram").weights(gram)
    assert torch.equal(gram, kept)


def test_results_are_converted_and_cut_off_from_autograd():
    weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    assert not gk.Aggregate(lambda rows: weight * rows[0])(ROWS).requires_grad
    direction, _ = step_with(ROWS, gk.Aggregate(lambda rows: weight * rows[0]))
    assert torch.equal(direction, 2 * ROWS[0])
    direction, _ = step_with(ROWS, gk.Aggregate(lambda rows: rows[0].float()))
    torch.testing.assert_close(direction, ROWS[0].float().double())

    def differentiates(rows):
        rows = rows.requires_grad_()
        return torch.autograd.grad(rows.square().sum() / 2, rows)[0].sum(0)

    direction, _ = step_with(ROWS, gk.Aggregate(differentiates))
    torch.testing.assert_close(direction, ROWS.sum(0))


def test_an_infinite_observer_is_not_seen():
    rows = ROWS.clone()
    rows[1] = torch.inf
    for rule in (gk.Aggregate(lambda rows: rows.sum(0)), gk.Aggregate(made("UPGrad"))):
        direction, _ = step_with(rows, Observed("b"), rule, nonfinite="ignore")
        assert direction.isfinite().all()
    direction, _ = step_with(ROWS, Observed("a", "b", "c"), gk.Aggregate(lambda rows: 1 / 0))
    assert not direction.any()


def test_sam_around_calls_again():
    calls = []

    def total(rows):
        calls.append(rows)
        return rows.sum(0)

    direction, _ = step_with(ROWS, gk.Aggregate(total), gk.SAM())
    assert len(calls) == 2
    torch.testing.assert_close(direction, ROWS.sum(0))


def test_wrong_results_are_named():
    def shapeless(rows):
        return rows.sum()

    with pytest.raises(ValueError, match=r"shapeless returned a tensor of shape \[\].*\[10\]$"):
        gk.Aggregate(shapeless)(ROWS)
    with pytest.raises(ValueError, match=r"a Gram matrix of shape \[3, 3\]; it must return real"):
        gk.Aggregate(shapeless, of="gram")(ROWS)
    with pytest.raises(ValueError, match="complex"):
        gk.Aggregate(lambda rows: rows[0] * 1j)(ROWS)
    with pytest.raises(TypeError, match=r"<lambda> returned a list for rows of shape \[3, 10\]"):
        step_with(ROWS, gk.Aggregate(lambda rows: rows[0].tolist()))


def test_errors_are_passed_on_and_change_nothing():
    class OwnError(Exception):
        pass

    error = OwnError()

    def fails(rows):
        raise error

    for of in ("rows", "gram"):
        weight = nn.Parameter(torch.ones(2))
        optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0), gk.Aggregate(fails, of=of))
        with pytest.raises(OwnError) as caught:
            optimizer.step({"a": lambda: weight.sum(), "b": lambda: weight.square().sum()})
        assert caught.value is error
        assert weight.tolist() == [1.0, 1.0]


def test_which_rules_can_follow():
    base = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    gk.wrap(base, gk.Aggregate(made("UPGrad")), gk.Mean())
    for first in (gk.Aggregate(len), gk.Aggregate(made("UPGrad"), scope="tensor")):
        with pytest.raises(ValueError, match=r"Mean\(\) cannot follow Aggregate\(function="):
            gk.wrap(base, first, gk.Mean())


@pytest.mark.parametrize("of", ["rows", "gram"])
def test_sharded_parameters(of):
    weight = nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([weight], lr=1.0)
    with as_users_run_it():
        layout = dataclasses.replace(Layout.of(base.param_groups), shards=object())
        context = Context(layout, Pool(layout), base)
        rule = gk.Aggregate(len, of=of)
        if of == "gram":
            rule.around(lambda at, only: None, context)
            return
        with pytest.raises(ValueError, match="function of whole gradients, and parameters are sha"):
            rule.around(lambda at, only: None, context)


def test_copies_are_equal():
    rule = gk.Aggregate(made("UPGrad"), scope="group")
    again = copy.deepcopy(rule)
    assert again.works_on == "gram"
    assert repr(again) == repr(rule)
    torch.testing.assert_close(step_with(ROWS, again)[0], step_with(ROWS, rule)[0])


def test_arguments_are_checked():
    with as_users_run_it():
        with pytest.raises(TypeError, match=r"function is the class UPGrad; pass an object, UPGra"):
            gk.Aggregate(torchjd.aggregation.UPGrad)
        with pytest.raises(TypeError, match="function is 3; pass something that can be called"):
            gk.Aggregate(3)
        with pytest.raises(ValueError, match="of is 'matrix'; choose 'auto', 'rows' or 'gram'"):
            gk.Aggregate(len, of="matrix")
        with pytest.raises(ValueError, match="scope is 'layer'"):
            gk.Aggregate(len, scope="layer")
    for of in ("rows", "gram"):
        with pytest.raises(ValueError, match="works by tensor, and a bare matrix"):
            gk.Aggregate(len, of=of, scope="tensor")(ROWS)
    with pytest.raises(ValueError, match="a function of the gradients themselves; call it on them"):
        gk.Aggregate(len).weights(torch.eye(2))
