"""Engines: two ways of computing gradients at displaced weights."""

from __future__ import annotations

from gradkit.engines.choice import EngineName, choose_engine
from gradkit.engines.session import Session

__all__ = ["EngineName", "Session", "choose_engine"]
