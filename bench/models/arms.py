"""Three arms of one model: what its row-parallel layers do after their matmul, and nothing else, differs.

| arm       | o_proj and down_proj                                                                             |
| --------- | ------------------------------------------------------------------------------------------------ |
| `nccl`    | transformers' own: F.linear, then `dist.all_reduce` in place (over gloo where ranks are CPUs)    |
| `ours`    | tp_overlap_kernels.integrations.transformers, as a user enables it; dispatch chooses the plan     |
| `ceiling` | F.linear alone. Its results are wrong; its time is what is left when communication costs nothing  |

transformers puts a layer's parallel style into its `forward`; each arm keeps the forwards that its styles made, and
`active` exchanges them. The gather of the logits is transformers' own in all arms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

import tp_overlap_kernels as tpo
from tp_overlap_kernels.integrations import transformers as adapter

NCCL, OURS, CEILING = "nccl", "ours", "ceiling"
ARMS = (NCCL, OURS, CEILING)
ROW_PARALLEL = "rowwise"  # the style, in the plans of the models of configs.py

Forward = Callable[..., Any]


class Arms:
    """The forwards of each arm for every row-parallel layer of `model`, which sharded.py has made.

    max_tokens: rows of the arena; larger calls run in row chunks. Collective: makes the arena. `close` gives it back.
    Errors: InvalidInput where a layer cannot be fused, since an arm that is not ours would be timed as ours.
    """

    def __init__(self, model: Any, mesh: DeviceMesh, max_tokens: int) -> None:
        from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard

        self.model = model
        self.rows: dict[str, nn.Module] = {
            name: module
            for name, module in model.named_modules()
            if model.tp_plan.get(replace_layer_number_by_wildcard(name)) == ROW_PARALLEL
        }
        self.forwards: dict[str, dict[str, Forward]] = {NCCL: {n: module.forward for n, module in self.rows.items()}}
        self.forwards[CEILING] = {name: _matmul_alone(module) for name, module in self.rows.items()}
        adapter.enable(max_tokens=max_tokens, required=True)
        try:
            style = ALL_PARALLEL_STYLES[ROW_PARALLEL]
            for name, module in self.rows.items():
                del module.forward  # of transformers' style: what it wraps is the layer's own
                style.validate_param(module, "weight", mesh, parameter_name=f"{name}.weight")
                style.install_forward(module, mesh)
            self.forwards[OURS] = {name: module.forward for name, module in self.rows.items()}
        finally:
            adapter.disable()

    @contextlib.contextmanager
    def active(self, arm: str) -> Iterator[Any]:
        """The model as this arm runs it. A graph that is captured meanwhile is the arm's for good."""
        for name, module in self.rows.items():
            module.forward = self.forwards[arm][name]
        yield self.model

    def check(self) -> None:
        """Raises where the device, idle by now, has noted that a call of `ours` went wrong."""
        tpo.check()

    def close(self) -> None:
        """Gives the arena back. Graphs of `ours` must not run any more."""
        tpo.close()


def local_weight(module: nn.Module) -> Tensor:
    """This rank's [N, K] of a row-parallel layer."""
    return module.weight.to_local()


def _matmul_alone(module: nn.Module) -> Forward:
    assert module.bias is None, "none of the models of configs.py has a bias in a row-parallel layer"
    weight = local_weight(module)
    return lambda x: functional.linear(x, weight)
