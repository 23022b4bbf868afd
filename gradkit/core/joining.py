"""Rows of several evaluations in one `Gradients`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradkit.core.flat import Pool, copy_parts
from gradkit.core.gradients import Gradients


def join(
    sources: Mapping[str, Gradients], names: Sequence[str], pool: Pool, last: Gradients
) -> Gradients:
    """Gradients whose rows come from several evaluations.

    Args:
        sources: For each objective, the evaluation that its row is taken from.
        names: The objectives' order.
        pool: Memory for the rows.
        last: The evaluation whose factor of the learning rate is kept.

    Raises:
        ValueError: If one of the evaluations has an `update`, which belongs to one point only.
    """
    if any(part.has_update for part in sources.values()):
        raise ValueError(
            "gradients of different points cannot be joined after a rule has set the update; "
            "put the transform that displaces before that rule in wrap()"
        )
    names = tuple(name for name in names if name in sources)
    taken = [(sources[name], sources[name].index(name)) for name in names]
    rows, views = pool.take(len(names))
    for index, name in enumerate(names):
        row = sources[name].row(name)
        if isinstance(row, Tensor):
            rows[index].copy_(row)
        else:
            copy_parts(row, views[index])
    dtype = functools.reduce(torch.promote_types, (part.losses.dtype for part, _ in taken))
    joined = Gradients(
        names,
        torch.stack([part.losses[k].to(dtype) for part, k in taken]),
        rows,
        layout=pool.layout,
        reached=_joined_flags(taken),
    )
    observers = frozenset(name for name in names if name in sources[name].observers)
    scale = last.lr_scale if last.scales_lr else None
    weights = None
    if not all(part.has_unit_weights for part, _ in taken):
        weights = torch.stack([part.weights[k] for part, k in taken])
    return joined.replace(weights=weights, observers=observers, lr_scale=scale)


def _joined_flags(rows: Sequence[tuple[Gradients, int]]) -> tuple[tuple[bool, ...], ...] | None:
    flags = [part.reached[k] for part, k in rows if part.reached is not None]
    return tuple(flags) if len(flags) == len(rows) else None
