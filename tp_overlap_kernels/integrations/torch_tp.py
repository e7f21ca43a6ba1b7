"""torch.distributed.tensor.parallel: a row-wise style whose linear layers call the fused op.

    from tp_overlap_kernels.integrations.torch_tp import OverlapRowwise

    parallelize_module(mlp, mesh, {"w1": ColwiseParallel(), "w2": OverlapRowwise(max_tokens=8192)})

Shards and hooks are those of RowwiseParallel, so inputs of any layout are brought to this rank's columns first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor.parallel import RowwiseParallel

from .adoption import Request, adopt, local, wanted

HOST = "tp_overlap_kernels for parallelize_module"


class OverlapRowwise(RowwiseParallel):
    """RowwiseParallel with GEMM and sum as one op: `gemm_all_reduce`, which adds the bias once.

    input_layouts, output_layouts, use_local_output: those of RowwiseParallel. Only the default output, replicated, is
    what the op gives. max_tokens: max_M of the arena, which the first layer makes; default TP_OVERLAP_MAX_TOKENS.
    required: False leaves layers and calls that cannot be fused to RowwiseParallel, counted and logged; by default,
    since the layer was named in the plan, they are errors (InvalidInput). TP_OVERLAP=0 leaves all to it.
    Every rank applies the same plan.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
        max_tokens: int | None = None,
        required: bool | None = None,
    ) -> None:
        super().__init__(input_layouts=input_layouts, output_layouts=output_layouts, use_local_output=use_local_output)
        required = wanted(HOST, required, otherwise=True)
        self.request = None if required is None else Request(HOST, max_tokens, required=required)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # Before the weights are divided: an error leaves the module as it was.
        layer = None
        if self.request is not None:
            gives_sum = self.output_layouts == (Replicate(),)
            name = f"{type(module).__name__}({module.extra_repr()})"
            layer = adopt(self.request, name, module, device_mesh.get_group(), gives_sum=gives_sum)
        module = super()._apply(module, device_mesh)
        if layer is None:
            return module
        unfused = module.forward

        def forward(x: Tensor) -> Any:
            # The hooks of the parent make a DTensor of the input, and take one for the output.
            columns, weight, bias = local(x), local(module.weight), local(module.bias)
            if not layer.fuses(columns, weight, bias):
                return unfused(x)
            total = layer(columns, weight, bias)
            return DTensor.from_local(total, device_mesh, [Replicate()], run_check=False)

        module.forward = forward
        return module
