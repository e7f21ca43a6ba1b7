"""SGLang: its row-parallel linear layers, o_proj and down_proj of dense models as a rule, call the fused op.

    TP_OVERLAP=auto sglang serve --model-path MODEL --tp W

The package's entry point `sglang.srt.plugins` registers hooks with SGLang's registry, around RowParallelLinear's
`__init__` and `forward`. That serves layers that sum their own output. In most decoders they do not: o_proj and
down_proj are built with reduce_results=False, and the boundary of the decoder layer owes the sum, as the layer's
`stage_facts` declare. For the decoders of DECODERS the plugin takes the sum over, by hooks around these, too:

    the decoder layer is built             o_proj, down_proj are built, and noted
                                           stage_facts: for each of the two that can be fused, the declaration is
                                           changed to "the output is the sum", and the layer now owns its sum
    a call of a layer that owns its sum    the op, or where a call is declined SGLang's forward and its all-reduce

So whether a layer sums and whether the boundary does are one decision. Declarations are changed for the very object
under construction, after its layers have been seen in it; where a hook is not in place, that never happens.
"""

from __future__ import annotations

import dataclasses
import functools
import pkgutil
from typing import Any

from torch import Tensor

from .adoption import Adopted, Request
from .engines import BATCH_INVARIANT, LORA, TWO_BATCHES, asked, fused_output, settle_row_parallel

HOST = "tp_overlap_kernels for SGLang"
LINEAR = "sglang.srt.layers.linear.RowParallelLinear"
# Read as of SGLang 0.5.23: their attention returns what o_proj returns, their FFN what down_proj returns.
DECODERS = (
    "sglang.srt.models.llama.LlamaDecoderLayer",
    "sglang.srt.models.qwen2.Qwen2DecoderLayer",
    "sglang.srt.models.qwen3.Qwen3DecoderLayer",
)

_plugin: Plugin | None = None  # of this process; hooks cannot be taken back


def register() -> None:
    """The entry point: from now on this process builds models with the fused op, unless TP_OVERLAP is unset or 0.

    SGLang calls it in each of its processes, before any model is built; calling it again changes nothing.
    SGLang logs what a plugin raises and goes on. So where TP_OVERLAP=1 cannot be met, it is the first layer that
    raises InvalidInput.
    """
    global _plugin
    required = asked(HOST)
    if required is not None and _plugin is None:
        _plugin = Plugin(Request(HOST, required=required))
        _plugin.hook()


@dataclasses.dataclass
class Building:
    """A decoder layer under construction. layers: (name, layer) of the row-parallel ones in it that are undecided."""

    module: Any
    layers: list[tuple[str, Any]] = dataclasses.field(default_factory=list)

    def take(self, path: str) -> tuple[str, Any] | None:
        """The (name, layer) at `path`, decided by the caller from now on; None where none was made there."""
        found = functools.reduce(lambda module, name: getattr(module, name, None), path.split("."), self.module)
        for index, (_, layer) in enumerate(self.layers):
            if layer is found:
                return self.layers.pop(index)
        return None


class Plugin:
    """The hooks, and what they know of the models that are being built in this process."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.building: list[Building] = []

    def hook(self) -> None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(f"{LINEAR}.__init__", self.after_init, HookType.AFTER)
        HookRegistry.register(f"{LINEAR}.forward", self.forward, HookType.AROUND)
        for decoder in DECODERS:
            if not _exists(f"{decoder}.stage_facts"):
                continue  # another SGLang: its layers sum by themselves, or are left alone
            HookRegistry.register(f"{decoder}.__init__", self.build, HookType.AROUND)
            HookRegistry.register(f"{decoder}.stage_facts", functools.partial(self.facts, decoder), HookType.AROUND)

    # ---- building

    def after_init(self, _: None, module: Any, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        """A RowParallelLinear was made: decide, or leave it to the decoder layer that it is made in."""
        if type(module) is not pkgutil.resolve_name(LINEAR):
            return  # a model's own kind of layer, which may do anything
        name = prefix or f"{type(module).__name__}({module.extra_repr()})"
        if self.building:
            self.building[-1].layers.append((name, module))
        else:
            self.adopt(name, module)

    def build(self, original: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        """Around a decoder layer's constructor."""
        self.building.append(Building(module))
        try:
            original(module, *args, **kwargs)
            for name, layer in self.building[-1].layers:  # those of which `facts` was not asked
                self.adopt(name, layer)
        finally:
            self.building.pop()

    def facts(self, decoder: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a decoder layer's stage_facts, which its constructor calls when its layers have been made.

        Under pipeline parallelism SGLang asks for them at other times, too; then nothing is taken over.
        """
        stages = original(*args, **kwargs)
        building = self.building[-1] if self.building else None
        if building is None or type(building.module) is not pkgutil.resolve_name(decoder):
            return stages  # of a subclass, which may add to what its layers return
        attention, ffn = stages
        obstacle = _why_boundary_stays(attention, ffn)
        if self.take_over(building, "self_attn.o_proj", obstacle):
            from sglang.srt.layers.layer_boundary.output import SumImplementation

            attention = dataclasses.replace(attention, sum_impl=SumImplementation(run=_summed_already))
        if self.take_over(building, "mlp.down_proj", obstacle):
            ffn = dataclasses.replace(ffn, output_complete=True)
        return attention, ffn

    def take_over(self, building: Building, path: str, obstacle: str) -> bool:
        """Whether the layer at `path` sums its output from now on, which nobody else then may."""
        found = building.take(path)
        if found is None:
            return False
        name, module = found
        layer = self.adopt(name, module, f"the layer boundary, {obstacle}" if obstacle else "")
        module.tp_overlap_owns_sum = not layer.declined
        return module.tp_overlap_owns_sum

    def adopt(self, name: str, module: Any, summed_by: str = "the layer boundary, or its caller") -> Adopted:
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

        self.request.max_tokens = _token_budget()
        group, obstacle = _group_of(module)
        obstacle = _obstacle() if not obstacle[0] else obstacle
        layer = settle_row_parallel(self.request, name, module, group, UnquantizedLinearMethod, obstacle, summed_by)
        module.tp_overlap = layer
        return layer

    # ---- calling

    def forward(
        self,
        original: Any,
        module: Any,
        input_: Any,
        skip_all_reduce: bool = False,
        forward_batch: Any = None,
        output_tensor: Tensor | None = None,
    ) -> Any:
        """Around a layer's forward, whose arguments these are."""
        from sglang.srt.layers.moe.utils import should_skip_mlp_all_reduce
        from sglang.srt.runtime_context import get_parallel

        layer = getattr(module, "tp_overlap", None)
        if layer is None:
            return original(module, input_, skip_all_reduce, forward_batch, output_tensor)
        owns_sum = getattr(module, "tp_overlap_owns_sum", False)  # whatever the caller says: nobody else sums
        partial = not owns_sum and (skip_all_reduce or should_skip_mlp_all_reduce())
        hindrance = "partial" if partial else "output_tensor" if output_tensor is not None else ""
        output = fused_output(layer, module, input_, hindrance)
        if output is not None:
            return output, module.bias if module.skip_bias_add else None
        output, bias = original(module, input_, skip_all_reduce, forward_batch, output_tensor)
        return get_parallel().tp_group.all_reduce(output) if owns_sum else output, bias


def _exists(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def _summed_already(partial: Tensor, forward_batch: Any) -> Tensor:
    """What a boundary runs in place of its sum: o_proj owns it, and this is its output."""
    return partial


def _token_budget() -> int:
    """Rows of the largest call: a chunk of prefill, or a token of each running request."""
    from sglang.srt.runtime_context import get_schedule

    schedule = get_schedule()
    chunk = schedule.chunked_prefill_size or 0
    return max(chunk if chunk > 0 else schedule.max_prefill_tokens, schedule.max_running_requests or 0)


def _group_of(module: Any) -> tuple[Any, tuple[str, str]]:
    """The ProcessGroup over which the layer is divided, and what is in the way of summing over it.

    Without data- and context-parallel attention, which `_obstacle` rules out, all sums are over the tensor-parallel
    group; attention's groups are the same ranks under other names.
    """
    from sglang.srt.runtime_context import get_parallel

    if module.tp_group is None or module.tp_group.world_size == 1:
        return None, ("", "")
    parts, whole = module.tp_group, get_parallel().tp_group
    if (parts.world_size, parts.rank_in_group) != (whole.world_size, whole.rank_in_group):
        return None, ("other_group", "it is divided over other ranks than the tensor-parallel group that sums it.")
    return whole.device_group, ("", "")


def _obstacle() -> tuple[str, str]:
    """(reason, sentence) of what SGLang's settings put in the way of all layers; both empty where nothing does."""
    from sglang.srt.runtime_context import get_exec, get_lora, get_parallel

    parallel, run, lora = get_parallel(), get_exec(), get_lora()
    if not hasattr(pkgutil.resolve_name(f"{LINEAR}.forward"), "__wrapped__"):  # the registry logs a failure and goes on
        return "no_hook", "SGLang has not put the hook around the layers' forward: see its log."
    if lora.enable_lora or lora.lora_paths:
        return LORA
    if run.deterministic.enable_deterministic_inference or run.deterministic.rl_on_policy_target:
        return BATCH_INVARIANT
    if run.overlap.enable_two_batch_overlap:
        return TWO_BATCHES
    if parallel.attn_dp_size > 1 or parallel.attn_cp_size > 1:
        return "other_group", "attention is data- or context-parallel, so ranks may differ in their numbers of rows."
    for name in ("enable_layernorm_sp", "enable_attn_tp_input_scattered"):
        if getattr(parallel, name):
            return "other_sum", f"{name} is on, and each rank then keeps its own rows of the sum."
    if run.comm.enable_quant_communications:
        return "other_sum", "enable_quant_communications is on, and the op sends bf16 and fp16."
    return "", ""


def _why_boundary_stays(attention: Any, ffn: Any) -> str:
    """Why the sums of a decoder layer are not taken over from its boundary, after "the layer boundary, "."""
    from sglang.srt.runtime_context import get_exec, get_parallel, get_spec

    parallel, comm = get_parallel(), get_exec().comm
    if attention.sum_impl is not None or ffn.output_complete or ffn.sparse or ffn.read.completing_fusions:
        return "which the model gives a sum of its own"
    if comm.flashinfer_allreduce_fusion_backend or comm.enable_aiter_allreduce_fusion:
        return "which fuses it with RMSNorm, as the all-reduce fusion that was asked for does"
    if get_spec().speculative_algorithm:
        return "which speculative decoding reads"
    if parallel.pp_size > 1:
        return "which pipeline parallelism binds on other ranks"
    return "which computes dense layers on fewer ranks" if parallel.moe_dense_tp_size is not None else ""
