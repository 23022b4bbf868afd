"""The methods by name, with the paper's results for its Table 1."""

from collections.abc import Callable
from functools import partial

from examples.aneurysm.methods.cmdg import CMDG
from examples.aneurysm.methods.feddg import FedDG
from examples.aneurysm.methods.mean_teacher import GSEMA, NoTeacher, PlainEMA
from examples.aneurysm.methods.method import Batch, Method
from examples.aneurysm.methods.nnunet import NNUNet
from examples.aneurysm.methods.vaseg import VASeg
from examples.aneurysm.settings import TrainingSettings

__all__ = ["METHODS", "WITH_TEACHER", "Batch", "Method", "make_method"]

METHODS: dict[str, Callable[[TrainingSettings], Method]] = {
    "supervised": Method,
    "nnunet": NNUNet,
    "vaseg": VASeg,
    "feddg": FedDG,
    "cmdg": CMDG,
    "none": NoTeacher,
    "ema": PlainEMA,
    "gsema": GSEMA,
    "bacl-v": partial(GSEMA, part="volume"),
    "bacl-b": partial(GSEMA, part="boundary"),
    "bacl": partial(GSEMA, part="both"),
}
"""By name; "none" has no teacher, and "bacl" is the paper's whole method."""

WITH_TEACHER = ("ema", "gsema", "bacl-v", "bacl-b", "bacl")
"""Those whose mean teacher is evaluated."""


def make_method(settings: TrainingSettings) -> Method:
    """The method that the settings name."""
    return METHODS[settings.method](settings)
