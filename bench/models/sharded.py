"""A model of transformers on this rank: its own modelling code and plan, published sizes, random weights.

The model is built on the meta device, transformers divides it there (every weight becomes a DTensor that has no
memory), and then each of this rank's shards gets memory and random numbers on the device, one after the other: no rank
ever holds more than its own part. Weights have variance 1 / in_features, so that values neither grow nor vanish from
layer to layer, and a whole run is finite. Seeds are such that ranks have different shards, and equal copies of what is
not divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..launch import World
from . import slots
from .configs import ModelSizes

BIAS_STD = 0.1


def sharded(sizes: ModelSizes, world: World, dtype: torch.dtype, seed: int = 0) -> tuple[Any, DeviceMesh]:
    """(the model in eval mode, the mesh it is divided over). Collective: all ranks call it with equal arguments.

    Errors: ValueError where `sizes` do not divide over the ranks.
    """
    from transformers import AutoModelForCausalLM
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    sizes.check_divides(world.world_size)
    slots.register()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(sizes), dtype=dtype, attn_implementation=slots.NAME)
    group = dist.group.WORLD
    assert group is not None  # bench.launch has made it
    mesh = DeviceMesh.from_group(group, world.device.type)
    apply_tensor_parallelism(model, mesh)
    # Not in inference mode: its tensors do not count their writes, which is how the op knows a weight to be at rest.
    with torch.no_grad():
        for index, (module, name, param) in enumerate(list(_parameters(model))):
            module._parameters[name] = nn.Parameter(_filled(param, world, seed + index), requires_grad=False)
    # Buffers are tables of angles, computed from the config and not loaded.
    with world.device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.eval(), mesh


def _config(sizes: ModelSizes) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        sizes.kind,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocab,
        max_position_embeddings=sizes.positions,
        rms_norm_eps=sizes.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        tie_word_embeddings=False,
    )


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            yield module, name, param


def _filled(param: torch.Tensor, world: World, seed: int) -> torch.Tensor:
    """Random numbers of the parameter's shape on the device: this rank's shard where it is divided."""
    planned = isinstance(param, DTensor)
    shape = param.to_local().shape if isinstance(param, DTensor) else param.shape
    divided = isinstance(param, DTensor) and not all(each.is_replicate() for each in param.placements)
    generator = torch.Generator(world.device)
    generator.manual_seed(seed * world.world_size + (world.rank if divided else 0))
    values = torch.empty(shape, dtype=param.dtype, device=world.device)
    if param.ndim == 1 and not planned:  # the scale of a norm
        values.fill_(1.0)
    else:
        std = BIAS_STD if param.ndim == 1 else param.shape[-1] ** -0.5
        values.normal_(std=std, generator=generator)
    if not isinstance(param, DTensor):
        return values
    layout = {"shape": param.shape, "stride": param.stride()}
    return DTensor.from_local(values, param.device_mesh, param.placements, run_check=False, **layout)
