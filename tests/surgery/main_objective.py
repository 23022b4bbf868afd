"""CosineGate and GSMorph by their definitions."""

import torch


def gated(jacobian, main=0, mode="weighted"):
    """Du et al.'s rule, vector by vector."""
    direction = jacobian[main].clone()
    for a, auxiliary in enumerate(jacobian):
        lengths = float(auxiliary.norm() * jacobian[main].norm())
        cosine = float(torch.dot(auxiliary, jacobian[main])) / lengths if lengths > 0 else 0.0
        if a != main:
            direction += (max(0.0, cosine) if mode == "weighted" else cosine >= 0) * auxiliary
    return direction


def projected(jacobian, main=0):
    """Dou et al.'s rule, vector by vector."""
    direction = jacobian[main].clone()
    for a, auxiliary in enumerate(jacobian):
        product = torch.dot(direction, auxiliary)
        if a != main and product < 0:
            direction -= product / auxiliary.square().sum() * auxiliary
    return direction
