"""Elementwise rules by definition: one column at a time, and the numbers that a rule draws."""

import torch
from helpers import jacobians, seeded


def sign(number):
    return (number > 0) - (number < 0)


# The papers' definitions, a column at a time, in Python's own numbers.


def agree(column):
    return column[0] != 0 and all(sign(number) == sign(column[0]) for number in column)


def by_column(jacobian, reference, *more):
    columns = zip(jacobian.T.tolist(), *more, strict=True)
    return torch.tensor([reference(*arguments) for arguments in columns], dtype=torch.float64)


def uniform_of(rule, width):
    """The numbers that a rule draws for a bare matrix."""
    twin = torch.Generator()
    twin.set_state(rule.generator.get_state())
    seed = int(torch.randint(2**62, (), generator=twin))
    return torch.rand(width, generator=seeded(seed)).tolist()


def normal_of(rule, width):
    twin = torch.Generator()
    twin.set_state(rule.generator.get_state())
    seed = int(torch.randint(2**62, (), generator=twin))
    return torch.randn(width, generator=seeded(seed)).double()


wide = jacobians(1, 6).map(lambda j: torch.cat([j, j.roll(1, 0), 3 * j.roll(2, 0)], dim=1))


def unusual(count, generator):
    """Random and structured gradients."""
    plain = torch.randn(count, 7, generator=generator, dtype=torch.float64)
    zero, equal, opposite = plain.clone(), plain.clone(), plain.clone()
    zero[0], equal[-1], opposite[-1] = 0, plain[0], -plain[0]
    return plain, zero, equal, opposite, plain.sign(), 1e6 * plain, 1e-6 * plain
