"""Loss scaling for float16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState


class LossScale:
    """A `torch.amp.GradScaler`, as one optimizer uses it.

    Losses are multiplied by the scale before they are differentiated, and gradients are divided by
    it once. The scale is updated once per step, however many evaluations the step makes.

    Args:
        scaler: The scaler.
        owners: The optimizer, and its base.

    Examples:
        >>> import torch
        >>> scale = LossScale(torch.amp.GradScaler("cpu", init_scale=8.0))
        >>> scale.scaled(torch.tensor(2.0)), scale.inverse(torch.device("cpu"))
        (tensor(16.), tensor(0.1250))
        >>> scale.update(torch.device("cpu"), overflowed=True)
        >>> scale.scaler.get_scale()
        4.0
    """

    def __init__(self, scaler: GradScaler, owners: Sequence[object] = ()) -> None:
        self.scaler = scaler
        self._owners = set(map(id, owners))

    def refuse_unscaled(self, *, in_closure: bool = False) -> None:
        """Check that `scaler.unscale_` was not called on the optimizer.

        Args:
            in_closure: Whether a closure may have called it; the call is then removed from the
                scaler's state.

        Raises:
            RuntimeError: If it was called.
        """
        states = getattr(self.scaler, "_per_optimizer_states", {})
        found = [
            owner
            for owner in self._owners
            if owner in states and states[owner].get("stage") is OptState.UNSCALED
        ]
        if in_closure:
            for owner in found:
                del states[owner]
        if found:
            raise RuntimeError(
                "scaler.unscale_() was called on this optimizer, by itself or in scaler.step(), "
                "but the optimizer unscales gradients itself, so that they would be divided by "
                "the scale twice; call optimizer.step(closure) alone, and clip by max_norm= of "
                "gk.wrap()"
            )

    def scaled(self, loss: Float[Tensor, "*K"]) -> Float[Tensor, "*K"]:
        """One or several losses times the scale."""
        scaled: Tensor = self.scaler.scale(loss)
        return scaled

    def inverse(self, device: torch.device) -> Float[Tensor, ""]:
        """One over the scale, on the device, without a copy to the host."""
        scale: Tensor = self.scaler.scale(torch.ones((), device=device))
        return scale.reciprocal()

    def update(self, device: torch.device, *, overflowed: bool) -> None:
        """Update the scale: it shrinks after an overflow, and grows after steps without one."""
        # The scaler finds overflows in an optimizer's gradients. It gets a single number, since the
        # gradients of the step came from several evaluations.
        probe = torch.nn.Parameter(torch.zeros((), device=device))
        probe.grad = torch.full((), torch.inf if overflowed else 0.0, device=device)
        self.scaler.unscale_(torch.optim.SGD([probe]))
        self.scaler.update()
