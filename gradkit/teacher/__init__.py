"""Mean teachers: modules that follow a student by an exponential moving average."""

from gradkit.teacher.ema import EMA
from gradkit.teacher.following import follow
from gradkit.teacher.gated_ema import GatedEMA
from gradkit.teacher.mean_teacher import MeanTeacher

__all__ = ["EMA", "GatedEMA", "MeanTeacher", "follow"]
