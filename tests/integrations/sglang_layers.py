"""SGLang's own decoder layers on CPU ranks: its linear layers, boundaries, runtime settings and hooks, and our plugin.

SGLang's kernels exist for GPUs only. What they compute here is stood in for (attention by its query, RoPE by nothing,
norm and activation by torch); what this is about is not: who sums the outputs of o_proj and down_proj.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch.nn import functional as F

from tests.integrations.sglang_stand_in import DECODERS
from tests.integrations.surroundings import environment
from tp_overlap_kernels.layers import counters, routing

LAYERS, HIDDEN = 2, 256
ROWS = (5, 1, 33)


class Kernels:
    """Finds `sgl_kernel`, and whatever is asked of it."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("sgl_kernel") else None

    def create_module(self, spec: Any) -> Any:
        return MagicMock(name=spec.name, __version__="0", __path__=[], __name__=spec.name)

    def exec_module(self, module: Any) -> None: ...


class Batch(SimpleNamespace):
    """A ForwardBatch of which the boundaries ask nothing but what it is given."""

    def __getattr__(self, name: str) -> None:
        return None


def start(rank: int, world_size: int, folder: str) -> None:
    """A scheduler's process, up to where it builds a model."""
    if "torchvision" not in sys.modules:
        library = torch.library.Library("torchvision", "DEF")  # schemas that its wheel for CUDA defines
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.torchvision_schemas = library  # type: ignore[attr-defined]  # as long as the process
        sys.meta_path.insert(0, Kernels())
    os.environ |= {"SGLANG_USE_CPU_ENGINE": "0", "HF_HUB_OFFLINE": "1"}
    from sglang.srt import runtime_context
    from sglang.srt.distributed import parallel_state
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    settings = {"device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True}
    arguments = ServerArgs(folder, tp_size=world_size, skip_tokenizer_init=True, chunked_prefill_size=64, **settings)
    runtime_context.publish(arguments, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=rank))
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.init_distributed_environment(world_size, rank, local_rank=rank, backend="gloo")
        parallel_state.initialize_model_parallel(backend="gloo")


def run(
    rank: int, world_size: int, model: str, folder: str, overlap: str | None, spoil: bool
) -> tuple[list[torch.Tensor], int, dict[str, int]]:
    """(outputs of the stack of layers; sums that were asked of SGLang's groups; what was counted)

    spoil: no weight is contiguous, so that each call is declined after the layers have taken their sums over.
    """
    with environment(overlap):
        start(rank, world_size, folder)
        routing.reset_counters()
        layers = build(rank, model, folder)
        sums = count_sums()
        if spoil:
            for layer in layers:
                for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    linear.weight.data = linear.weight.data.t().contiguous().t()
        with torch.inference_mode():
            outputs = [forward(layers, rows) for rows in ROWS]
        return outputs, len(sums), counters()


def build(rank: int, model: str, folder: str) -> Any:
    """The layers, with random weights of this rank."""
    from sglang.srt.utils import make_pp_layers
    from transformers import AutoConfig

    kind = getattr(importlib.import_module(f"sglang.srt.models.{model}"), DECODERS[model])
    config = AutoConfig.from_pretrained(folder)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layers, _, _ = make_pp_layers(
            LAYERS,
            lambda idx, prefix: kind(config=config, layer_id=idx, prefix=prefix),
            prefix="model.layers",
            stage_facts=lambda idx: kind.stage_facts(config, idx),
        )
    finally:
        torch.set_default_dtype(default)
    generator = torch.Generator().manual_seed(100 + rank)
    for name, param in layers.named_parameters():
        fixed = torch.ones(param.shape) if "norm" in name else 0.1 * torch.randn(param.shape, generator=generator)
        param.data.copy_(fixed)
    for layer in layers:
        stand_in_for_kernels(layer)
    return layers


def stand_in_for_kernels(layer: Any) -> None:
    attention = layer.self_attn
    attention.attn.forward = lambda q, k, v, batch, **_: q
    attention.rotary_emb.forward = lambda positions, q, k, **_: (q, k)
    layer.mlp.act_fn.forward = lambda x: F.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1]
    if hasattr(attention, "q_norm"):
        sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        attention.forward_prepare_native = lambda positions, hidden_states: attention.qkv_proj(hidden_states)[0].split(
            sizes, dim=-1
        )
    layer.input_layernorm.forward = layer.post_attention_layernorm.forward = norm


def norm(x: torch.Tensor, residual: torch.Tensor | None = None, *_: Any, **__: Any) -> Any:
    x = x if residual is None else x + residual
    y = F.rms_norm(x, x.shape[-1:])
    return y if residual is None else (y, x)


def count_sums() -> list[None]:
    """A list that grows by an entry with each sum over more than one rank."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    sums: list[None] = []
    before = getattr(GroupCoordinator.all_reduce, "__wrapped__", GroupCoordinator.all_reduce)

    def all_reduce(group: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sums.extend([None] * (group.world_size > 1))
        return before(group, x, *args, **kwargs)

    all_reduce.__wrapped__ = before  # type: ignore[attr-defined]
    GroupCoordinator.all_reduce = all_reduce
    return sums


def forward(layers: Any, rows: int) -> torch.Tensor:
    """As the models' own: the residual stream begins, goes through the layers, and ends in the last norm."""
    from sglang.srt.layers.layer_boundary.residual import batch as residual
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    last = RMSNorm(HIDDEN)
    last.forward = norm
    x = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows)).bfloat16()
    batch = Batch(forward_mode=ForwardMode.EXTEND, input_ids=torch.zeros(rows), batch_size=1)
    residual.start(batch)
    for layer in layers:
        x = layer(torch.arange(rows), x, batch)
    return residual.final_norm(x, batch, last).clone()
