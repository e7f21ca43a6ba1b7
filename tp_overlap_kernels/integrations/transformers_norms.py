"""Which row-parallel layers of a model of transformers are joined to the norms behind them, and how.

| declined as | because                                                                                           |
| ----------- | ------------------------------------------------------------------------------------------------- |
| decoder     | its decoder layer is not the known one: parallel residual, norms behind the blocks, dropout, ...  |
| block       | its attention or MLP is not known to give the layer's output as it is (experts, for example)      |
| between     | the model does more between its decoder layers than to pass on what they give                     |
| norm        | the norm is not the known RMS norm: LayerNorm, 1 + weight as in Gemma, a kernel in its place      |
| unfused     | the layer itself was declined (adoption.py)                                                       |

A layer that is declined calls the op without a norm, as it does without `fuse_norms`. The reasons of single calls are
those of transformers_forwards.py; `counters()` has both.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import InvalidInput
from .adoption import Request, kind
from .transformers_forwards import DecoderForward, Joint, NormForward, RowForward, Way
from .transformers_source import DECODER_LAYER, RMS_NORM, hands_layer_to_layer, hands_on, is_program

log = logging.getLogger(__name__)

DECLINED = {
    "decoder": "its decoder layer does not run as Llama's, or something stands in for its forward.",
    "block": "nothing says that its block returns the layer's output as it is.",
    "between": "the model does more between decoder layers than to pass on what they give.",
    "unfused": "it was declined before, and runs as transformers would run it.",
    "norm": "the norm behind it is not an RMS norm as Llama's, or something stands in for its forward.",
}


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of a decoder layer: its name there, the row-parallel layer at its end, and the norm behind."""

    name: str
    row: str
    norm: nn.Module | None
    declined: str = ""
    hooks: tuple[Any, ...] = ()  # that the owners of the norm's input may not have


def join(model: nn.Module, request: Request) -> int:
    """Joins what can be joined in `model`; returns how many joints there are now. Errors: InvalidInput."""
    layers = [module for module in model.modules() if isinstance(module.__dict__.get("forward"), RowForward)]
    if not layers:
        raise InvalidInput(
            f"{request.host}: {type(model).__name__} has no row-parallel layer of ours. "
            "Call enable(), on every rank, before from_pretrained."
        )
    for layer in layers:
        row = layer.__dict__["forward"]
        if row.joint is None:
            row.joint = _apart(row, "decoder", request)
    for stack in list(model.modules()):
        if isinstance(getattr(stack, "layers", None), nn.ModuleList):
            _join_stack(stack, request)
    rows = [layer.__dict__["forward"] for layer in layers]
    for row in rows:
        _settle(row, request)
    return sum(not row.joint.declined[0] for row in rows)


def _join_stack(stack: Any, request: Request) -> None:
    """Makes the joints of all decoder layers of a model, each with the norm that its successor begins with."""
    layers = list(stack.layers)
    in_a_row = "forward" not in stack.__dict__ and hands_layer_to_layer(type(stack).forward)
    for layer, successor in zip(layers, [*layers[1:], None], strict=True):
        if "forward" in layer.__dict__ or not is_program(type(layer).forward, DECODER_LAYER):
            continue
        after = getattr(stack, "norm", None) if successor is None else getattr(successor, "input_layernorm", None)
        around = (layer._forward_hooks,) if successor is None else (layer._forward_hooks, successor._forward_pre_hooks)
        attention = Block("self_attn", "o_proj", layer.post_attention_layernorm)
        mlp = Block("mlp", "down_proj", after, "" if in_a_row else "between", around)
        joints = [_joint(layer, block, request) for block in (attention, mlp)]
        if any(joint is not None and not joint.declined[0] for joint in joints):
            layer.forward = DecoderForward(layer, *joints)


def _joint(owner: nn.Module, at: Block, request: Request) -> Joint | None:
    """The joint behind one block, perhaps declined; None where the block holds no row-parallel layer of ours."""
    block = owner._modules[at.name]
    assert block is not None
    for other in _rows(block):  # experts, for example, and what is not found below
        other.joint = _apart(other, "block", request)
    module = block._modules.get(at.row)
    row = module.__dict__.get("forward") if module is not None else None
    if module is None or not isinstance(row, RowForward):
        return None
    if "forward" in block.__dict__ or not hands_on(type(block).forward, at.row):
        return row.joint
    if row.layer.declined or at.declined or not _is_rms_norm(at.norm):
        row.joint = _apart(row, at.declined or "norm", request)
        return row.joint
    assert at.norm is not None
    # Hooks that are given a module's output, or the input of the norm, where the residual is in it already.
    hooks = (module._forward_hooks, block._forward_hooks, at.norm._forward_pre_hooks, *at.hooks)
    row.joint = Joint(row.layer, Way(owner, at.name, block, at.row, row, hooks), at.norm, required=request.required)
    at.norm.forward = NormForward(row.joint, at.norm.forward)
    return row.joint


def _is_rms_norm(norm: nn.Module | None) -> bool:
    return norm is not None and "forward" not in norm.__dict__ and is_program(type(norm).forward, RMS_NORM)


def _rows(block: nn.Module) -> Iterator[RowForward]:
    for module in block.modules():
        row = module.__dict__.get("forward")
        if isinstance(row, RowForward):
            yield row


def _apart(row: RowForward, reason: str, request: Request) -> Joint:
    reason = "unfused" if row.layer.declined else reason
    return Joint(row.layer, None, None, (reason, DECLINED[reason]), request.required)


def _settle(row: RowForward, request: Request) -> None:
    """Says what has become of a layer, one line for all of a kind. Errors: InvalidInput where it had to be joined."""
    assert row.joint is not None
    reason, text = row.joint.declined
    name = row.layer.name
    if reason and request.required:
        raise InvalidInput(f"{request.host}: {name} cannot be joined to a norm, and was required to be: {text}")
    line = f"{kind(name)}: {text}"
    if row.layer.rank != 0 or line in request.said:
        return
    request.said.add(line)
    if reason:
        log.warning("%s: %s stays apart from its norm: %s", request.host, kind(name), text)
    else:
        log.info("%s: %s is one call with the residual and the norm behind it", request.host, kind(name))
