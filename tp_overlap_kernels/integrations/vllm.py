"""vLLM: its row-parallel linear layers, o_proj and down_proj as a rule, call the fused op.

    TP_OVERLAP=auto vllm serve MODEL --tensor-parallel-size W

The package's entry point `vllm.general_plugins` registers a subclass of RowParallelLinear with vLLM's registry of
out-of-tree layers; vLLM then makes one wherever a model makes a RowParallelLinear. Constructor, weights and loading are
those of the parent, whose forward also serves every call that is declined (engines.py). What differs is rounding:
vLLM adds the bias to rank 0's partial; the op adds it once, where the plan's kernel says.
"""

from __future__ import annotations

from typing import Any

from .adoption import Adopted, Request, kind
from .engines import (
    BATCH_INVARIANT,
    LORA,
    TWO_BATCHES,
    asked,
    fused_output,
    settle_row_parallel,
    speak_through,
    unavailable,
)

HOST = "tp_overlap_kernels for vLLM"
REPLACED = "RowParallelLinear"


def register() -> None:
    """The entry point: from now on this process builds models with the fused op, unless TP_OVERLAP is unset or 0.

    vLLM calls it in each of its processes, before any model is built; calling it again changes nothing.
    Errors: InvalidInput where TP_OVERLAP=1 and this vLLM has no such registry, or another plugin holds the layer.
    """
    required = asked(HOST)
    if required is None:
        return
    try:
        from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
        from vllm.model_executor.layers.linear import RowParallelLinear
    except ImportError as error:
        return unavailable(HOST, required, f"this vLLM has no registry of out-of-tree layers ({error}); 0.32 has one.")
    speak_through("vllm")
    holder = op_registry_oot.get(REPLACED)
    if holder is None:
        PluggableLayer.register_oot(name=REPLACED)(overlap_class(RowParallelLinear, Request(HOST, required=required)))
    elif holder.__module__ != __name__:
        unavailable(HOST, required, f"another plugin has replaced {REPLACED} by {holder.__module__}.{holder.__name__}.")


def overlap_class(parent: Any, request: Request) -> type:
    """The subclass of vLLM's RowParallelLinear whose forward is the op."""

    class OverlapRowParallelLinear(parent):
        tp_overlap: Adopted

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.tp_overlap = _adopt(request, self)

        def forward(self, input_: Any) -> Any:
            output = fused_output(self.tp_overlap, self, input_)
            if output is None:
                return super().forward(input_)
            if not self.return_bias:
                return output
            return output, self.bias if self.skip_bias_add else None

    return OverlapRowParallelLinear


def _adopt(request: Request, module: Any) -> Adopted:
    from vllm.config import get_current_vllm_config
    from vllm.distributed import get_tp_group
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    config = get_current_vllm_config()
    # Those of the model that is being built: a draft model beside it may be another.
    request.max_tokens = config.scheduler_config.max_num_batched_tokens
    request.max_N = config.model_config.get_hidden_size()
    group = get_tp_group().device_group if module.tp_size > 1 else None
    name = module.prefix or type(module).__name__
    layer = settle_row_parallel(request, name, module, group, UnquantizedLinearMethod, _obstacle(config))
    if not layer.declined:
        # On a CPU vLLM would pack the weight for oneDNN and leave an empty one.
        module._cpu_skip_gemm_dispatch = True
    _tell_compile_cache(config, name, layer)
    return layer


def _obstacle(config: Any) -> tuple[str, str]:
    """(reason, sentence) of what vLLM's settings put in the way of all layers; both empty where nothing does."""
    from vllm import envs

    if config.lora_config is not None:
        return LORA
    if envs.VLLM_BATCH_INVARIANT:
        return BATCH_INVARIANT
    if config.parallel_config.use_ubatching:
        return TWO_BATCHES
    if not isinstance(config.additional_config, dict):
        text = "additional_config is no dict, and only there can vLLM's cache of compiled graphs be told of the op."
        return "compile_cache", text
    return "", ""


def _tell_compile_cache(config: Any, name: str, layer: Adopted) -> None:
    """Makes the decision a part of the key under which vLLM keeps compiled graphs: it is traced into them."""
    if isinstance(config.additional_config, dict):
        decisions = config.additional_config.setdefault("tp_overlap", {})
        decisions[kind(name)] = f"declined: {layer.declined}" if layer.declined else f"group {layer.group_name}"
