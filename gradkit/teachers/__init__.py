"""Mean teachers: modules that are exponential moving averages of a student."""

from gradkit.teachers.ema import EMA
from gradkit.teachers.following import follow
from gradkit.teachers.gated_ema import GatedEMA
from gradkit.teachers.mean_teacher import MeanTeacher

__all__ = ["EMA", "GatedEMA", "MeanTeacher", "follow"]
