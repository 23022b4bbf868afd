"""The record of an optimizer's last step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.gram import cosines

Key = tuple[str, ...]
"""The kind of a number, and the objectives that it is of."""


@dataclass(frozen=True, eq=False, repr=False)
class StepRecord:
    """The record of one step, as tensors that are copied to the host only when they are read.

    Attributes:
        names: The K objectives.
        losses: Each objective's loss [K] at its first evaluation in the step.
        applied: Whether the base optimizer stepped; False after a skipped step.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.PCGrad())
        >>> _ = optimizer.step({"a": lambda: w[0], "b": lambda: w[1] - w[0]})
        >>> optimizer.last_step.cosine("a", "b")
        tensor(-0.7071)
    """

    names: tuple[str, ...]
    losses: Float[Tensor, " K"]
    applied: bool
    # Converted to the losses' dtype when they are read. Numbers are values that the host knew.
    _gram: Float[Tensor, "K K"]
    _weights: Float[Tensor, " K"] | list[float]
    _lr_scale: Float[Tensor, ""] | float
    _gate: Float[Tensor, ""] | None
    _gate_cosine: Float[Tensor, ""] | None
    _gate_rate: Float[Tensor, ""] | None
    _decay: Float[Tensor, ""] | None

    @property
    def gram(self) -> Float[Tensor, "K K"]:
        """The Gram matrix [K, K] of the gradients that were applied, over all parameters.

        After a rule with the scope "shared" it is the matrix over the shared parameters (over all
        parameters if none are shared). With "group" or "tensor" a rule uses several matrices; this
        is their sum, and `Gradients.gram` has each of them.
        """
        return self._gram.to(self.losses.dtype)

    @property
    def weights(self) -> Float[Tensor, " K"]:
        """The objectives' weights [K] in the direction.

        If the direction is not a weighted sum of whole gradients (rules by group or tensor or on
        shared parameters, elementwise rules), these are the weights before that rule.
        """
        return torch.as_tensor(self._weights, dtype=self.losses.dtype, device=self.losses.device)

    @property
    def lr_scale(self) -> Float[Tensor, ""]:
        """The factor of the learning rate."""
        return torch.as_tensor(self._lr_scale, dtype=self.losses.dtype, device=self.losses.device)

    @property
    def gate(self) -> Float[Tensor, ""] | None:
        """1 if the gradients were aligned, 0 if in conflict; None without a gated transform."""
        return None if self._gate is None else self._gate.to(self.losses.dtype)

    @property
    def gate_cosine(self) -> Float[Tensor, ""] | None:
        """The cosine that the gate depends on; None without a gated transform.

        It is that of the gate's own measure and parameters. `cosine` is always that of whole
        gradients.
        """
        return None if self._gate_cosine is None else self._gate_cosine.to(self.losses.dtype)

    @property
    def gate_rate(self) -> Float[Tensor, ""] | None:
        """The share of applied steps in which the gradients were aligned, this one included.

        None without a gated transform, and after a step that was not applied.
        """
        return None if self._gate_rate is None else self._gate_rate.to(self.losses.dtype)

    @property
    def decay(self) -> Float[Tensor, ""] | None:
        """The decay of a teacher's update; None without one."""
        return None if self._decay is None else self._decay.to(self.losses.dtype)

    def cosine(self, a: str, b: str) -> Float[Tensor, ""]:
        """The cosine of two objectives' gradients, from `gram`; 0 if one of them is zero.

        Raises:
            ValueError: If the step had no objective of that name.
        """
        for name in (a, b):
            if name not in self.names:
                raise ValueError(
                    f"the step had no objective {name!r}; it had {', '.join(map(repr, self.names))}"
                )
        i, j = self.names.index(a), self.names.index(b)
        return cosines(self._gram)[i, j].to(self.losses.dtype)

    def scalars(self) -> dict[str, float]:
        """The record as numbers by name, for a log; all are read by one copy from the device.

        Names are `loss/a`, `norm/a` (the Euclidean norm of the gradient) and `weight/a` for each
        objective `a`, `cosine/a,b` for each pair, `lr_scale` and `applied`, and, where a transform
        has set them, `gate`, `gate_cosine`, `gate_rate` and `decay`.

        Examples:
            >>> import torch, gradkit as gk
            >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
            >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1))
            >>> _ = optimizer.step({"a": lambda: 3 * w[0], "b": lambda: w[1] - w[0]})
            >>> for name, value in optimizer.last_step.scalars().items():
            ...     print(name, round(value, 4))
            loss/a 3.0
            loss/b 1.0
            norm/a 3.0
            norm/b 1.4142
            weight/a 1.0
            weight/b 1.0
            cosine/a,b -0.7071
            lr_scale 1.0
            applied 1.0
        """
        (found,) = numbers_of([self])
        return {scalar_name(key): value for key, value in found.items()}

    def __repr__(self) -> str:
        shown = ("names", "losses", "gram", "weights", "lr_scale", "gate", "decay", "applied")
        return f"StepRecord({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


def scalar_name(key: Key) -> str:
    r"""The name of a number in a log.

    A comma in an objective's own name is written as "\,", so that no two pairs have one name.

    Examples:
        >>> scalar_name(("gate",)), scalar_name(("loss", "a")), scalar_name(("cosine", "a", "b/c"))
        ('gate', 'loss/a', 'cosine/a,b/c')
    """
    kind, *names = key
    if len(names) > 1:
        names = [name.replace("\\", "\\\\").replace(",", "\\,") for name in names]
    return "/".join([kind, ",".join(names)]) if names else kind


def numbers_of(records: Sequence[StepRecord]) -> list[dict[Key, float]]:
    """The numbers of several records, read by one copy for all of them.

    Keys are the kind of a number and the objectives that it is of.
    """
    tensors = [
        (number, field.name, value)
        for number, record in enumerate(records)
        for field in fields(record)
        if isinstance(value := getattr(record, field.name), Tensor)
    ]
    if not tensors:
        return []
    read = torch.cat([value.detach().reshape(-1) for _, _, value in tensors]).tolist()
    values: list[dict[str, list[float]]] = [{} for _ in records]
    first = 0
    for number, name, value in tensors:
        values[number][name] = read[first : first + value.numel()]
        first += value.numel()
    return [_numbers(record, found) for record, found in zip(records, values, strict=True)]


def _numbers(record: StepRecord, read: Mapping[str, list[float]]) -> dict[Key, float]:
    """A record's numbers, from those that were read of its tensors."""
    names, gram = record.names, read["_gram"]
    count = len(names)
    norms = [math.sqrt(square) if square >= 0 else math.nan for square in gram[:: count + 1]]
    weights = read.get("_weights", record._weights)
    found: dict[Key, float] = {}
    for kind, values in ("loss", read["losses"]), ("norm", norms), ("weight", weights):
        found.update(((kind, name), x) for name, x in zip(names, values, strict=True))
    for (i, a), (j, b) in combinations(enumerate(names), 2):
        product = norms[i] * norms[j]
        cosine = gram[i * count + j] / product if product else 0.0
        found["cosine", a, b] = min(max(cosine, -1.0), 1.0)
    for name in ("lr_scale", "gate", "gate_cosine", "gate_rate", "decay"):
        value = getattr(record, f"_{name}")
        if value is not None:
            found[(name,)] = read[f"_{name}"][0] if isinstance(value, Tensor) else value
    found[("applied",)] = float(record.applied)
    return found
