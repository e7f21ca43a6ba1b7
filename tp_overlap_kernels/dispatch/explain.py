"""Why a plan was chosen, for people to read."""

from __future__ import annotations

import dataclasses

from .problem import Plan, Problem, Topology
from .select import Decision, decide
from .table import Table


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The choice and what led to it; str() is the text to print."""

    problem: Problem
    topology: Topology
    decision: Decision
    table: str  # name, digest and size, or why there is none

    @property
    def plan(self) -> Plan:
        return self.decision.plan

    def __str__(self) -> str:
        plan, source = self.plan, self.decision.source
        why = plan.why if plan.why == source else f"{source}: {plan.why}"
        return "\n".join(
            [
                str(self.problem),
                f"  plan   {plan.name}{_time(plan)}",
                *([f"         {_params(plan)}"] if plan.params else []),
                *([f"  inside {plan.inside}: {plan.inside.why}"] if plan.inside else []),
                f"  why    {why}",
                *self._others(),
                f"  where  {self._where()}",
                f"  table  {self.table}",
            ]
        )

    def _others(self) -> list[str]:
        """A line for each candidate that was not taken."""
        excluded = [(plan, reason) for plan, reason in self.decision.candidates if reason]
        later = [plan for plan, reason in self.decision.candidates if reason is None][1:]
        return [
            *(f"  not    {plan}{_time(plan)}: {reason}" for plan, reason in excluded),
            *(f"  then   {plan}{_time(plan)}{self._slower(plan)}" for plan in later),
        ]

    def _slower(self, candidate: Plan) -> str:
        if not candidate.us or not self.plan.us:
            return ""
        return f" ({candidate.us / self.plan.us - 1:+.0%})"

    def _where(self) -> str:
        here = self.topology
        ranks = f", {here.ranks_per_device} ranks a device" if here.ranks_per_device > 1 else ""
        if here.inside:
            ranks += f", {here.nodes} nodes of {here.inside.world_size} ranks"
        native = "with" if here.native else "without"
        return (
            f"{here.device}, backend {here.backend}{ranks}, {native} the CUDA library, "
            f"one-shot up to {here.one_shot_bytes // 1024} KiB, sentinel up to {here.sentinel_bytes // 1024} KiB"
        )


def explain_text(
    problem: Problem, topology: Topology, table: Table | None = None, forced: str | None = None
) -> Explanation:
    """What `select` chooses for the same arguments, with the reasons. Errors: those of `select`."""
    if table is None:
        described = "none for this device and world size: rule of thumb"
    else:
        described = f"{table.name}, digest {table.digest()}, measured problems: {len(table.entries)}"
    return Explanation(problem, topology, decide(problem, topology, table, forced), described)


def _time(plan: Plan) -> str:
    return f"  {plan.us:.1f} us" if plan.us else ""


def _params(plan: Plan) -> str:
    return " ".join(f"{key}={value}" for key, value in plan.params)
