"""IMTL-G and ConFIG by their definitions."""

import numpy as np
import torch


def units(jacobian):
    lengths = jacobian.norm(dim=1, keepdim=True)
    return jacobian / torch.where(lengths > 0, lengths, 1)


def imtlg(jacobian):
    """IMTL-G of independent gradients, from the equations that define it."""
    rows = jacobian.numpy()
    unit = units(jacobian).numpy()
    count = len(rows)
    # ⟨Σ w_i g_i, u_1 − u_k⟩ = 0 for each k > 1, and Σ w_i = 1.
    equations = np.ones((count, count))
    for k in range(1, count):
        equations[k] = rows @ (unit[0] - unit[k])
    wanted = np.eye(count)[0]
    return torch.from_numpy(np.linalg.solve(equations, wanted) @ rows)


def config(jacobian, preference=None, cutoff=1e-6):
    """Equation 2 of Liu et al. by the pseudo-inverse of the units, as the authors' code has it."""
    preference = np.ones(len(jacobian)) if preference is None else np.asarray(preference)
    direction = np.linalg.pinv(units(jacobian).numpy(), rcond=cutoff) @ preference
    length = np.linalg.norm(direction)
    if length < 1e-9:
        return torch.zeros_like(jacobian[0])
    direction = direction / length
    return torch.from_numpy((jacobian.numpy() @ direction).sum() * direction)
