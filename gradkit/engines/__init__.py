"""Two ways of taking gradients at displaced weights, behind one oracle."""

from __future__ import annotations

from gradkit.engines.choice import EngineName, choose_engine
from gradkit.engines.session import Session

__all__ = ["EngineName", "Session", "choose_engine"]
