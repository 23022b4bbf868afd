"""The options of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from torch import nn
from torch.amp import GradScaler

from gradkit.core.context import Streams
from gradkit.core.ranks import ProcessGroupChoice
from gradkit.core.transform import Transform, leading_reweighings
from gradkit.engines.choice import ENGINES, EngineName
from gradkit.optimizer.finite_check import NONFINITE, Nonfinite

OnEmpty = Literal["raise", "skip"]
RowsChoice = Literal["auto", "keep", "stream"]


@dataclass
class StepOptions:
    """The options passed to `wrap`, which documents them.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option has no valid value.
    """

    model: nn.Module | None = None
    engine: EngineName = "auto"
    nonfinite: Nonfinite = "raise"
    max_norm: float | None = None
    replay_rng: bool = False
    scaler: GradScaler | None = None
    process_group: ProcessGroupChoice = "auto"
    rows: RowsChoice = "auto"
    on_empty: OnEmpty = "raise"

    def __post_init__(self) -> None:
        if self.model is not None and not isinstance(self.model, nn.Module):
            kind = type(self.model).__name__
            raise TypeError(f"model is a {kind}; pass the torch.nn.Module")
        _check_choice("engine", self.engine, ENGINES)
        _check_choice("nonfinite", self.nonfinite, NONFINITE)
        _check_choice("on_empty", self.on_empty, get_args(OnEmpty))
        _check_choice("rows", self.rows, get_args(RowsChoice))
        if self.max_norm is not None and not isinstance(self.max_norm, (int, float)):
            raise TypeError(f"max_norm is {self.max_norm!r}; pass a positive number, or None")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(
                f"max_norm is {self.max_norm}; it must be positive, or None for no clipping"
            )
        if not isinstance(self.replay_rng, bool):
            raise TypeError(f"replay_rng is {self.replay_rng!r}; pass True or False")
        if self.scaler is not None and not isinstance(self.scaler, GradScaler):
            kind = type(self.scaler).__name__
            raise TypeError(f"scaler is a {kind}; pass a torch.amp.GradScaler")
        if isinstance(self.process_group, str) and self.process_group != "auto":
            raise ValueError(
                f"process_group is {self.process_group!r}; pass 'auto', None or a ProcessGroup, "
                "such as torch.distributed.group.WORLD"
            )

    def shown(self) -> list[str]:
        """The options other than the model that are not the defaults, as `wrap` takes them."""
        given = {
            each.name: getattr(self, each.name) for each in fields(self) if each.name != "model"
        }
        changed = {
            name: value for name, value in given.items() if value != getattr(StepOptions, name)
        }
        plain = (bool, int, float, str, type(None))
        return [
            f"{name}={value!r}"
            if isinstance(value, plain)
            else f"{name}={type(value).__name__}(...)"
            for name, value in changed.items()
        ]

    def streams(self, transforms: Sequence[Transform]) -> Streams:
        """Whether the next step back-propagates the weighted sum of the losses in one pass.

        Raises:
            ValueError: If it has to, and a transform needs single gradients.
        """
        weighers = leading_reweighings(transforms)
        around = transforms[len(weighers) :]
        looking = [transform for transform in around if transform.needs_rows]
        if self.rows == "stream":
            if looking:
                raise ValueError(
                    f"rows='stream' keeps no objective's own gradient, and {looking[0]!r} looks at "
                    "them; pass rows='keep'"
                )
            return "must"
        alone = bool(weighers) and not any(weigher.needs_rows for weigher in weighers)
        return "may" if self.rows == "auto" and alone and not looking else "no"


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
