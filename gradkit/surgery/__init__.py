"""Gradient surgery: one direction from the gradients of several objectives."""

from gradkit.surgery.fixed import Mean, Sum
from gradkit.surgery.pcgrad import PCGrad
from gradkit.surgery.rule import Rule

__all__ = ["Mean", "PCGrad", "Rule", "Sum"]
