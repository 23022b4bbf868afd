"""The active-set method; the solvers that use it have tests of their own."""

from __future__ import annotations

import torch

from gradkit.surgery.solvers import active_set, prepared
from surgery.problems import GRAMS, normal


def test_the_primal_method_alone_finds_the_same() -> None:
    """It finishes what block pivoting does not."""
    # Asked for by its name, since block pivoting ends with these matrices, and with nearly all.
    for name in ["conflicting", "dependent", "mixed lengths", "many"]:
        matrix = GRAMS[name]
        cosines, lengths, _ = prepared.prepare(matrix[None])
        linear = -normal(1, len(matrix), seed=12).abs() * lengths
        for problem in [
            active_set.over_simplex(cosines, -linear, 1 / lengths),
            active_set.Quadratic(cosines + 0.01 * torch.eye(len(matrix)), linear),
        ]:
            start = torch.ones_like(lengths)
            expected, _, _ = active_set.minimise(problem, start > 0)
            centre = torch.zeros_like(start)
            found, _ = active_set._primal(problem, start, centre)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
