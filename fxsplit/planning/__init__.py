"""Planning: from what a model costs to a plan of stages, cuts and compressors."""

from fxsplit.planning.budget import Budget
from fxsplit.planning.devices import Placement, check_available, parse_devices
from fxsplit.planning.parts import Cut, Edge, Part
from fxsplit.planning.plan import Plan
from fxsplit.planning.planner import plan

__all__ = ["Budget", "Cut", "Edge", "Part", "Placement", "Plan", "check_available", "parse_devices", "plan"]
