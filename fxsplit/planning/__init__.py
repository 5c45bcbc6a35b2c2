"""Planning: from what a model costs to a plan of stages, cuts and compressors."""

from fxsplit.planning.budget import Budget
from fxsplit.planning.devices import Placement, check_available, parse_devices
from fxsplit.planning.guard import Guard
from fxsplit.planning.parts import Cut, Edge, Part
from fxsplit.planning.plan import Plan
from fxsplit.planning.planner import plan
from fxsplit.planning.profile import CodecSpeed, NodeSeconds, Profile

__all__ = [
    "Budget",
    "CodecSpeed",
    "Cut",
    "Edge",
    "Guard",
    "NodeSeconds",
    "Part",
    "Placement",
    "Plan",
    "Profile",
    "check_available",
    "parse_devices",
    "plan",
]
