"""Which kernel runs a call, and why. Imports no torch, no Triton and no other room, so a laptop can ask and test."""

from .explain import Explanation, explain_text
from .problem import PLAN_NAMES, Plan, Problem, Topology
from .select import select
from .table import Table, load

__all__ = ["PLAN_NAMES", "Explanation", "Plan", "Problem", "Table", "Topology", "explain_text", "load", "select"]
