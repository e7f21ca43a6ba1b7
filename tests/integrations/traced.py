"""What torch.compile makes of a model: one graph for all inputs, which is run as it was traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def traced(run: Callable[..., Any], op: str) -> tuple[Callable[..., Any], list[int]]:
    """(`run`, compiled for inputs of any length; how often each of its graphs, as they are made, calls the op)

    op: a part of its name. A break of the graph raises.
    """
    calls: list[int] = []

    def count_ops(graph: torch.fx.GraphModule, _: Any) -> Any:
        calls.append(sum(op in str(node.target) for node in graph.graph.nodes))
        return graph

    torch.compiler.reset()
    return torch.compile(run, fullgraph=True, dynamic=True, backend=count_ops), calls
