"""ConFIG alone; what holds of IMTL-G, too, is in test_imtlg_and_config.py."""

import torch
from helpers import relative_error, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torchjd.aggregation import ConFIG as TorchjdConFIG

import gradkit as gk
from surgery.projections import config, units
from surgery.rule_steps import dependent_gradients, directions, independent_gradients, step_with


def test_dependent_gradients_of_config_equal_torchjds():
    jacobians = list(dependent_gradients(200))
    for jacobian, ours in zip(jacobians, directions(gk.ConFIG(), jacobians), strict=True):
        assert relative_error(ours, TorchjdConFIG()(jacobian)) < 1e-7
        assert relative_error(ours, config(jacobian)) < 1e-7


@settings(deadline=None, max_examples=30)
@given(independent_gradients(), st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
def test_cosines_to_config_are_in_the_ratio_of_the_preference(jacobian, preference):
    preference = preference[: len(jacobian)]
    direction = gk.ConFIG(preference)(jacobian)
    wanted = torch.tensor(preference, dtype=torch.float64)
    ratios = units(jacobian) @ direction / wanted
    assert (ratios > 0).all()
    torch.testing.assert_close(ratios, ratios[0].expand(len(jacobian)))
    projections = jacobian @ direction / direction.norm()
    torch.testing.assert_close(direction.norm(), projections.sum())


def test_preferences_by_name_in_a_step():
    rows = torch.randn(3, 10, generator=seeded(0), dtype=torch.float64)
    direction, _ = step_with(rows, gk.ConFIG({"b": 2.0, "a": 1.0, "c": 0.0}))
    torch.testing.assert_close(direction, config(rows, [1.0, 2.0, 0.0]))
