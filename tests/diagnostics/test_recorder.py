"""The recorder's columns, beside losses, norms and cosines computed by hand."""

import copy
import csv
import itertools
import math
import pickle
import signal
import sys
import threading
import warnings
from array import array

import numpy as np
import pytest
import torch
from helpers import as_users_run_it, seeded

import gradkit as gk
from gradkit.diagnostics import Recorder
from gradkit.optimizer.record import scalar_name
from gradkit.testing import bits

TARGETS = {"a": (1.0, 0.0, 2.0), "b": (-1.0, 1.0, 0.5), "c": (0.0, -2.0, 1.0)}


def problem(*transforms, **options):
    """Three numbers, and for each objective the squared distance to its target."""
    w = torch.nn.Parameter(torch.tensor([0.5, -0.5, 1.0], dtype=torch.float64))
    return w, gk.wrap(torch.optim.SGD([w], lr=0.1), *transforms, **options)


def objectives(w, names="ab"):
    return {
        name: lambda name=name: (w - w.new_tensor(TARGETS[name])).square().sum() for name in names
    }


def by_hand(w, names):
    """Losses, norms and cosines at the present weights."""
    found = {}
    grads = {name: 2 * (w.detach() - w.new_tensor(TARGETS[name])).numpy() for name in names}
    for name, grad in grads.items():
        found[f"loss/{name}"] = (grad**2).sum() / 4
        found[f"norm/{name}"] = math.sqrt((grad**2).sum())
    for a in names:
        for b in names:
            if a < b:
                product = (grads[a] * grads[b]).sum()
                found[f"cosine/{a},{b}"] = product / found[f"norm/{a}"] / found[f"norm/{b}"]
    return found


def test_columns_are_what_the_steps_did() -> None:
    w, optimizer = problem(gk.PCGrad(generator=seeded(0)))
    recorder = Recorder(optimizer)
    expected, weights = [], []
    for _ in range(5):
        expected.append(by_hand(w, "abc"))
        optimizer.step(objectives(w, "abc"))
        weights.append(optimizer.last_step.weights.numpy())
    assert recorder.names == ("a", "b", "c")
    assert len(recorder) == 5
    columns = recorder.columns()
    assert list(columns)[:2] == ["step", "loss/a"]
    np.testing.assert_array_equal(columns["step"], [1, 2, 3, 4, 5])
    for name in expected[0]:
        np.testing.assert_allclose(columns[name], [each[name] for each in expected], rtol=1e-12)
    for k, name in enumerate("abc"):
        np.testing.assert_array_equal(recorder[f"weight/{name}"], [row[k] for row in weights])
    np.testing.assert_array_equal(recorder["lr_scale"], 1)
    np.testing.assert_array_equal(recorder["applied"], 1)
    np.testing.assert_array_equal(recorder.cosine("c", "a"), columns["cosine/a,c"])
    for (a, b), share in recorder.conflicts().items():
        assert share == (columns[f"cosine/{a},{b}"] < 0).mean()


def test_recording_changes_nothing() -> None:
    runs = []
    for follows in (False, True):
        w, optimizer = problem(gk.GradVac())
        recorder = Recorder(optimizer) if follows else None
        for _ in range(4):
            optimizer.step(objectives(w))
            assert recorder is None or len(recorder.columns()["step"])
        runs.append(bits(w))
    assert runs[0] == runs[1]


def test_objectives_may_come_and_go() -> None:
    w, optimizer = problem()
    recorder = Recorder(optimizer)
    for names in ("ab", "ca", "b"):
        optimizer.step(objectives(w, names))
    assert recorder.names == ("a", "b", "c")
    np.testing.assert_array_equal(np.isnan(recorder["loss/a"]), [False, False, True])
    np.testing.assert_array_equal(np.isnan(recorder["loss/c"]), [True, False, True])
    # In the second step "c" came before "a".
    np.testing.assert_array_equal(np.isnan(recorder.cosine("a", "c")), [True, False, True])
    assert "cosine/c,a" not in recorder.columns()
    assert np.isnan(recorder.cosine("b", "c")).all()
    assert math.isnan(recorder.conflicts()["b", "c"])


def test_names_with_commas_and_slashes_share_no_column() -> None:
    w, optimizer = problem()
    recorder = Recorder(optimizer)
    names = ("a", "b,c", "a,b", "c", "a\\,b", "b/c")
    targets = torch.randn(len(names), 3, generator=seeded(0), dtype=torch.float64)
    closures = {
        name: lambda target=target: (w - target).square().sum()
        for name, target in zip(names, targets, strict=True)
    }
    optimizer.step(closures)
    found = {}
    for a, b in itertools.combinations(names, 2):
        found[a, b] = optimizer.last_step.cosine(a, b)
    optimizer.step(dict(reversed(closures.items())))
    for (a, b), cosine in found.items():
        expected = [cosine, optimizer.last_step.cosine(a, b)]
        np.testing.assert_allclose(recorder.cosine(a, b), expected, rtol=1e-12)
        assert recorder.conflicts()[a, b] == (np.array(expected) < 0).mean()
    assert {"loss/b,c", "cosine/a,b/c", r"cosine/a,b\,c"} < recorder.columns().keys()
    assert optimizer.last_step.scalars().keys() <= recorder.columns().keys() | {
        scalar_name(("cosine", b, a)) for a, b in found
    }
    assert len(recorder.columns()) == 1 + 3 * 6 + 15 + 2


def test_many_objectives_are_read_sooner(monkeypatch) -> None:
    monkeypatch.setattr("gradkit.diagnostics.recorder._PENDING_PRODUCTS", 13)
    w, optimizer = problem()
    recorder = Recorder(optimizer)
    for names, pending in (("ab", 1), ("abc", 0), ("abc", 1), ("ab", 0)):
        optimizer.step(objectives(w, names))
        assert len(recorder._pending) == pending
    assert len(recorder) == 4


def test_ctrl_c_while_reading_loses_nothing(monkeypatch) -> None:
    w, optimizer = problem()
    recorder = Recorder(optimizer)
    for _ in range(3):
        optimizer.step(objectives(w))

    def interrupted(records):
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("gradkit.diagnostics.recorder.numbers_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recorder.columns()

    class Late(array):
        def append(self, value):
            super().append(value)
            if len(self) == 2:
                signal.raise_signal(signal.SIGINT)

    recorder._columns["step",] = Late("d")
    with pytest.raises(KeyboardInterrupt):  # once all columns are complete
        recorder.columns()
    assert {len(column) for column in recorder.columns().values()} == {3}
    np.testing.assert_array_equal(recorder["step"], [1, 2, 3])


def test_other_threads_may_read() -> None:
    w, optimizer = problem()
    recorder = Recorder(optimizer)
    done = threading.Event()
    lengths, errors = [], []

    def read():
        try:
            while not done.is_set():
                lengths.append({len(column) for column in recorder.columns().values()})
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for _ in range(100):
            optimizer.step(objectives(w))
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
        sys.setswitchinterval(switching)
    assert not errors
    assert all(len(each) == 1 for each in lengths)
    np.testing.assert_array_equal(recorder["step"], np.arange(1, 101))


def test_it_can_be_copied_and_pickled() -> None:
    w, optimizer = problem()
    recorder = Recorder(optimizer)
    optimizer.step(objectives(w))
    twins = [copy.deepcopy(recorder), pickle.loads(pickle.dumps(recorder))]
    optimizer.step(objectives(w))
    for twin in twins:
        twin.close()
        np.testing.assert_array_equal(twin["step"], [1])  # it follows no optimizer
    optimizer.step(objectives(w))
    np.testing.assert_array_equal(recorder["step"], [1, 2, 3])


def test_more_steps_than_are_read_at_once() -> None:
    w, optimizer = problem()
    recorder = Recorder(optimizer)
    losses = [float(optimizer.step(objectives(w, "a"))) for _ in range(300)]
    np.testing.assert_array_equal(recorder["loss/a"], losses)


def test_one_step_in_a_few() -> None:
    w, optimizer = problem()
    with Recorder(optimizer, every=3) as recorder:
        losses = [float(optimizer.step(objectives(w, "a"))) for _ in range(8)]
    optimizer.step(objectives(w, "a"))
    optimizer.step(objectives(w, "a"))  # the tenth, which would have been recorded
    np.testing.assert_array_equal(recorder["step"], [1, 4, 7])
    np.testing.assert_array_equal(recorder["loss/a"], losses[::3])


def test_skipped_steps_are_kept_and_count_as_no_conflict() -> None:
    w, optimizer = problem(nonfinite="skip")
    recorder = Recorder(optimizer)
    optimizer.step(objectives(w))
    optimizer.step({"a": lambda: w.sum() * torch.nan, "b": lambda: w.sum()})
    optimizer.step(objectives(w))
    np.testing.assert_array_equal(recorder["applied"], [1, 0, 1])
    assert math.isnan(recorder["loss/a"][1])
    assert recorder.conflicts() == {("a", "b"): 0.5 * sum(recorder.cosine("a", "b")[::2] < 0)}


def test_a_step_that_raises_leaves_no_entry() -> None:
    w, optimizer = problem()
    recorder = Recorder(optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: w.sum() / 0 if 1 / 0 else None)
    optimizer.step(objectives(w, "a"))
    np.testing.assert_array_equal(recorder["step"], [1])


def test_factors_gates_and_teachers() -> None:
    model = torch.nn.Linear(2, 1).double()
    teacher = copy.deepcopy(model)
    x = torch.randn(8, 2, generator=seeded(1), dtype=torch.float64)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gk.GSEMA(base, model, teacher)
    recorder = Recorder(optimizer)
    seen = []
    for _ in range(3):
        optimizer.step(
            {"source": lambda: model(x).square().mean(), "target": lambda: -model(x + 1).mean()}
        )
        step = optimizer.last_step
        seen.append([step.gate, step.gate_cosine, step.gate_rate, step.decay])
    names = ("gate", "gate_cosine", "gate_rate", "decay")
    for name, values in zip(names, zip(*seen, strict=True), strict=True):
        np.testing.assert_allclose(recorder[name], [float(value) for value in values], rtol=1e-6)
    grata = gk.GraTa(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    recorder = Recorder(grata)
    grata.step({"pseudo": lambda: model(x).square().mean(), "auxiliary": lambda: model(x).mean()})
    cosine = recorder.cosine("pseudo", "auxiliary")
    np.testing.assert_allclose(recorder["lr_scale"], (cosine + 1) ** 2 / 4, rtol=1e-12)
    np.testing.assert_array_equal(recorder["weight/auxiliary"], [0])


def test_it_resumes(tmp_path) -> None:
    w, optimizer = problem(gk.PCGrad(generator=seeded(0)))
    whole = Recorder(optimizer, every=2)
    first = Recorder(optimizer, every=2)
    for names in ("ab", "ba", "abc"):
        optimizer.step(objectives(w, names))
    torch.save(first.state_dict(), tmp_path / "record.pt")
    first.close()
    second = Recorder(optimizer, every=2)
    second.load_state_dict(torch.load(tmp_path / "record.pt", weights_only=True))
    for _ in range(3):
        optimizer.step(objectives(w, "ac"))
    assert second.names == whole.names
    assert list(second.columns()) == list(whole.columns())
    for name, column in whole.columns().items():
        np.testing.assert_array_equal(second[name], column)


def test_a_file_of_the_columns(tmp_path) -> None:
    w, optimizer = problem()
    recorder = Recorder(optimizer)
    recorder.to_csv(tmp_path / "empty.csv")
    assert (tmp_path / "empty.csv").read_text().split() == ["step"]
    for names in ("a", "ab"):
        optimizer.step(objectives(w, names))
    recorder.to_csv(tmp_path / "steps.csv")
    with (tmp_path / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert rows[0]["loss/b"] == rows[0]["cosine/a,b"] == ""
    for name, column in recorder.columns().items():
        assert float(rows[1][name]) == pytest.approx(column[1], rel=1e-8)


def test_copies_of_the_optimizer_are_not_followed() -> None:
    w, optimizer = problem()
    recorder = Recorder(optimizer)
    optimizer.step(objectives(w, "a"))
    twin = copy.deepcopy(optimizer)
    (parameter,) = twin.param_groups[0]["params"]
    twin.step(objectives(parameter, "a"))
    assert len(recorder) == 1


def test_an_adapter_is_followed() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    adapter = gk.tta.TENT(model, lr=1e-3, steps=2)
    recorder = Recorder(adapter.optimizer)
    for seed in range(2):
        adapter(torch.rand(1, 3, 4, 4, generator=seeded(seed)))
    assert len(recorder) == 4
    assert np.isfinite(recorder["norm/loss"]).all()


def test_what_is_wrong_is_said() -> None:
    w, optimizer = problem()
    with as_users_run_it(), pytest.raises(TypeError, match="a SGD keeps no record of its steps"):
        Recorder(optimizer.base)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    with as_users_run_it():
        with pytest.raises(
            TypeError, match="keeps no record of its steps; pass its attribute opti"
        ):
            Recorder(gk.tta.TENT(model))
        with pytest.raises(TypeError, match="no optimizer: an adapter that trains nothing has non"):
            Recorder(gk.tta.PTBN(model).optimizer)
    with pytest.raises(ValueError, match="every is 0"):
        Recorder(optimizer, every=0)
    recorder = Recorder(optimizer)
    assert recorder.conflicts() == {}
    optimizer.step(objectives(w))
    with pytest.raises(KeyError, match=r"no column 'lr'; there are step, loss/a"):
        recorder["lr"]
    names = [str(number) for number in range(20)]
    v, other = problem()
    many = Recorder(other)
    other.step(lambda: {name: v.sum() for name in names})
    with pytest.raises(KeyError, match=r"norm/18 and 213 more"):
        many["lr"]
    with pytest.raises(ValueError, match="no recorded step had an objective 'z'"):
        recorder.cosine("a", "z")
    with pytest.raises(ValueError, match="both are 'a'"):
        recorder.cosine("a", "a")
    state = recorder.state_dict()
    for broken, text in (
        ({"seen": 1}, "lacks 'columns', 'keys', 'names'"),
        ({**state, "columns": []}, r"has the columns \[\('step',\), .*\], of \[\] steps"),
        ({**state, "keys": [["x"], *state["keys"][1:]]}, r"has the columns \[\('x',\), "),
        ({**state, "columns": [torch.ones(2), *state["columns"][1:]]}, r"of \[2, 1, "),
    ):
        with pytest.raises(ValueError, match=text):
            recorder.load_state_dict(broken)
    np.testing.assert_array_equal(recorder["step"], [1])


def test_a_warning_that_is_an_error_comes_after_the_hooks() -> None:
    w, optimizer = problem(gk.PCGrad())
    recorder = Recorder(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="acts between objectives"):
            optimizer.step(objectives(w, "a"))
    optimizer.step(objectives(w))
    np.testing.assert_array_equal(recorder["step"], [1, 2])
