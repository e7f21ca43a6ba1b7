"""Four arms of one model: what happens to the output of its row-parallel layers, and nothing else, differs.

| arm         | o_proj and down_proj                                                                             |
| ----------- | ------------------------------------------------------------------------------------------------ |
| `nccl`      | transformers' own: F.linear, then `dist.all_reduce` in place (over gloo where ranks are CPUs)    |
| `ours`      | tp_overlap_kernels.integrations.transformers with its `fuse_norms`: layer, residual and the norm |
|             | behind it are one op; dispatch chooses the plan                                                  |
| `ours_sums` | the same without `fuse_norms`: the layer is one op; residual and norm are transformers' own      |
| `ceiling`   | F.linear alone. Its results are wrong; its time is what is left when communication costs nothing |
|             | and norms are transformers' own                                                                  |

transformers' parallel styles and the adapter put what they do into the `forward` of single modules; each arm keeps
those forwards, and `active` exchanges them. The gather of the logits is transformers' own in all arms.
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

NCCL, OURS, OURS_SUMS, CEILING = "nccl", "ours", "ours_sums", "ceiling"
ARMS = (NCCL, OURS, OURS_SUMS, CEILING)
ROW_PARALLEL = "rowwise"  # the style, in the plans of the models of configs.py

Forward = Callable[..., Any]


class Arms:
    """The forwards of each arm, of all modules of `model` that differ between arms. sharded.py has made the model.

    rows: the row-parallel layers by name. forwards: by arm and name; None where a module runs that of its class.
    max_tokens: rows of the arena; larger calls run in row chunks. Collective: makes the arena. `close` gives it back.
    Errors: InvalidInput where a layer cannot be fused, or not be joined to a norm, since an arm that is not ours would
    be timed as ours.
    """

    def __init__(self, model: Any, mesh: DeviceMesh, max_tokens: int) -> None:
        from transformers.distributed.tensor_parallel import replace_layer_number_by_wildcard

        self.model = model
        self.rows: dict[str, nn.Module] = {
            name: module
            for name, module in model.named_modules()
            if model.tp_plan.get(replace_layer_number_by_wildcard(name)) == ROW_PARALLEL
        }
        of_arm = {NCCL: _replaced_forwards(model)}
        of_arm[CEILING] = of_arm[NCCL] | {name: _matmul_alone(module) for name, module in self.rows.items()}
        adapter.enable(max_tokens=max_tokens, required=True)
        try:
            self._install(mesh)
            of_arm[OURS_SUMS] = _replaced_forwards(model)
            self._install(mesh)  # once more: a layer's forward knows whether it is joined to a norm
            self._join()
            of_arm[OURS] = _replaced_forwards(model)
        finally:
            adapter.disable()
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if len({id(forwards.get(name)) for forwards in of_arm.values()}) > 1
        }
        self.forwards: dict[str, dict[str, Forward | None]] = {
            arm: {name: of_arm[arm].get(name) for name in self._modules} for arm in ARMS
        }

    def _install(self, mesh: DeviceMesh) -> None:
        """The style that `enable` has registered, in place of the one that every row-parallel layer has."""
        from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

        style = ALL_PARALLEL_STYLES[ROW_PARALLEL]
        for name, module in self.rows.items():
            del module.forward  # what a style wraps is the layer's own
            style.validate_param(module, "weight", mesh, parameter_name=f"{name}.weight")
            style.install_forward(module, mesh)

    def _join(self) -> None:
        joined, wanted = adapter.fuse_norms(self.model, required=True), 2 * self.model.config.num_hidden_layers
        if joined != wanted:
            raise tpo.InvalidInput(
                f"bench: {joined} of {wanted} layers (o_proj and down_proj of each decoder layer) are joined to the "
                f"norms behind them, and the arm {OURS!r} needs all. Choose a model whose plan divides both by row."
            )

    @contextlib.contextmanager
    def active(self, arm: str) -> Iterator[Any]:
        """The model as this arm runs it. A graph that is captured meanwhile is the arm's for good."""
        for name, forward in self.forwards[arm].items():
            if forward is None:
                vars(self._modules[name]).pop("forward", None)
            else:
                self._modules[name].forward = forward
        yield self.model

    def check(self) -> None:
        """Raises where the device, idle by now, has noted that a call of the op went wrong."""
        tpo.check()

    def close(self) -> None:
        """Gives the arena back. Graphs of `ours` and `ours_sums` must not run any more."""
        tpo.close()


def local_weight(module: nn.Module) -> Tensor:
    """This rank's [N, K] of a row-parallel layer."""
    return module.weight.to_local()


def _replaced_forwards(model: nn.Module) -> dict[str, Forward]:
    """The forwards that stand in modules themselves, in place of those of their classes; by name."""
    return {name: vars(module)["forward"] for name, module in model.named_modules() if "forward" in vars(module)}


def _matmul_alone(module: nn.Module) -> Forward:
    assert module.bias is None, "none of the models of configs.py has a bias in a row-parallel layer"
    weight = local_weight(module)
    return lambda x: functional.linear(x, weight)
