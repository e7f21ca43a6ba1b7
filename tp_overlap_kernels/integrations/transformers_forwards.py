"""What runs in place of the forwards of transformers' modules: a row-parallel layer's, and those around its joint.

A *joint* is a row-parallel layer, the residual that its decoder layer adds to the sum, and the RMS norm that follows:
o_proj with post_attention_layernorm, down_proj with the next layer's input_layernorm or the model's last norm.

    decoder layer                          row-parallel layer                     norm
    with joint.offer(residual):
        hidden = block(...)   ---------->  takes the residual:
                                           y, new_residual = op(..., residual)
    joint.add(residual, .)    <----------  gives new_residual
    norm(new_residual)        ------------------------------------------------>   its very input was normed: y

The residual is added once: by the layer that took it, or else by `add`, in the place where transformers adds it. A norm
gives y for the very tensor that the op gave beside it, and computes any other itself.

| apart         | why this call of the layer went to the op without the norm, or to transformers             |
| ------------- | ------------------------------------------------------------------------------------------ |
| unfused       | the layer's product did not go to the op at all; its own reason is counted beside this one |
| outside       | its decoder layer did not offer a residual: something else called it                       |
| replaced      | a module on the way, or its forward, is not the one that was looked at                     |
| hooks         | a hook on the way would see, or change, the sum with the residual in it                    |
| residual      | the residual is no plain tensor of the sum's shape and dtype, but for example f32          |
| norm_weight   | the norm's weight is no plain vector of the layer's dtype                                  |
| norm_grad     | a gradient of residual or norm is wanted                                                   |
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidInput
from ..layers import routing
from .adoption import Adopted, local

CAPTURE = "transformers.utils.output_capturing"  # its hooks keep attention weights, and what a decoder layer gives

SENTENCES = {
    "unfused": "its product does not go to the op.",
    "outside": "it was called, but not by the decoder layer whose residual it would take.",
    "replaced": "a module between it and the norm was replaced. Call fuse_norms after everything else has changed.",
    "hooks": "a hook between it and the norm would meet other values. Remove the hook.",
    "residual": "the residual is no plain tensor of its output's shape and dtype.",
    "norm_weight": "the norm's weight is no plain vector of its dtype.",
    "norm_grad": "a gradient is wanted, and the op has none. Wrap inference in torch.inference_mode().",
}


class RowForward:
    """The forward of a row-parallel nn.Linear: the op, the op with what is joined to it, or `unfused`."""

    def __init__(self, module: nn.Module, layer: Adopted, unfused: Callable[..., Any]) -> None:
        self.module, self.layer, self.unfused = module, layer, unfused
        self.joint: Joint | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, joint = self.module, self.joint
        # Looked up in each call: weights are loaded after this was made, and may be moved or replaced.
        weight, bias = local(module._parameters.get("weight")), local(module._parameters.get("bias"))
        x = args[0] if args else None
        quantised = getattr(module, "_hf_quantized_needs_local_tp", False)
        if not self.layer.fuses(x, weight, bias, "quantised" if quantised else ""):
            if joint is not None:
                joint.note("unfused")
            return self.unfused(*args, **kwargs)
        assert isinstance(x, Tensor)
        if joint is not None and joint.takes(x):
            return joint.sum(x, weight, bias)
        return self.layer(x, weight, bias)


@dataclasses.dataclass(frozen=True)
class Way:
    """The modules between a decoder layer's offer and its norm, as they were looked at. hooks: where none may be."""

    owner: nn.Module
    block_name: str
    block: nn.Module
    row_name: str
    row: RowForward
    hooks: tuple[Mapping[int, Callable[..., Any]], ...]

    def obstacle(self) -> str:
        """What has come into it since, as a reason; empty where nothing has."""
        block, module = self.block, self.row.module
        there = self.owner._modules.get(self.block_name) is block and block._modules.get(self.row_name) is module
        if not there or "forward" in block.__dict__ or module.forward is not self.row:
            return "replaced"
        return "hooks" if any(hooks and not _only_captures(hooks) for hooks in self.hooks) else ""


class Joint:
    """A row-parallel layer, a residual and a norm, and what is under way between them in one pass of the model.

    declined: (reason, sentence) why the three are never one call; then there may be no way and no norm. required: what
    is not one call is an InvalidInput. One thread at a time runs the model, as the ranks' order of calls wants anyway.
    """

    def __init__(
        self,
        layer: Adopted,
        way: Way | None,
        norm: nn.Module | None,
        declined: tuple[str, str] = ("", ""),
        required: bool = False,
    ) -> None:
        self.layer, self.way, self.norm = layer, way, norm
        self.declined, self.required = declined, required
        self.offered: Tensor | None = None
        self.y: Tensor | None = None
        self.new_residual: Tensor | None = None

    # ---- the decoder layer

    @contextlib.contextmanager
    def offer(self, residual: Tensor) -> Iterator[None]:
        """Whoever calls the row-parallel layer meanwhile may take `residual`, and then owes the sum of both."""
        self.offered, self.y, self.new_residual = residual, None, None
        try:
            yield
        finally:
            self.offered = None

    def add(self, residual: Tensor, hidden_states: Tensor) -> Tensor:
        """residual + hidden_states, where the layer has not seen to it."""
        if self.new_residual is None:
            return residual + hidden_states
        if hidden_states is not self.new_residual:
            raise InvalidInput(
                f"{self.layer.name}: its sum holds the residual, and came back as another tensor. Something between it "
                "and its decoder layer has changed since fuse_norms: call that last, on a model that stays as it is."
            )
        return hidden_states

    # ---- the row-parallel layer

    def takes(self, x: Tensor) -> bool:
        """Whether this call of the layer takes what is offered; counts it. x: the layer's input."""
        reason = self.declined[0] or self._why_not(x)
        self.note(reason)
        return not reason

    def note(self, reason: str) -> None:
        """Counts a call of the layer. Errors: InvalidInput where it is apart and was required not to be."""
        # A compiled call must not read the name, which its graph would be guarded by.
        name = "a compiled linear layer" if torch.compiler.is_compiling() else self.layer.name
        if reason and self.required:
            raise InvalidInput(f"{name}: its norm cannot be fused, and was required to be: {self._sentence(reason)}")
        said_before = not reason or reason == self.declined[0]
        routing.note_norm(reason, name, self.layer.rank, "" if said_before else self._sentence(reason))

    def sum(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """new_residual [..., N]: the sum over the ranks of x @ weight.T, bias, and the residual that was offered."""
        residual, self.offered = self.offered, None
        assert residual is not None and self.norm is not None
        scale, eps = local(self.norm._parameters["weight"]), self.norm.variance_epsilon
        self.y, self.new_residual = self.layer.with_norm(x, weight, bias, residual, scale, eps)
        return self.new_residual

    def _sentence(self, reason: str) -> str:
        return self.declined[1] if reason == self.declined[0] else SENTENCES[reason]

    def _why_not(self, x: Tensor) -> str:
        residual, way, norm, N = self.offered, self.way, self.norm, self.layer.N
        assert way is not None and norm is not None
        if residual is None:
            return "outside"
        obstacle = way.obstacle() or ("" if getattr(norm.forward, "joint", None) is self else "replaced")
        if obstacle:
            return obstacle
        if type(residual) is not Tensor or residual.dtype != x.dtype or residual.shape != (*x.shape[:-1], N):
            return "residual"
        weight = local(norm._parameters["weight"])
        if type(weight) not in (Tensor, nn.Parameter) or weight.dtype != x.dtype or weight.shape != (N,):
            return "norm_weight"
        needs_grad = torch.is_grad_enabled() and (residual.requires_grad or weight.requires_grad)
        return "norm_grad" if needs_grad else ""

    # ---- the norm

    def normed(self, hidden_states: Tensor) -> Tensor | None:
        """y, where it is the norm of this very tensor. It is given once, and nothing is kept."""
        y = self.y if hidden_states is self.new_residual else None
        self.y = self.new_residual = None
        return y


class NormForward:
    """The forward of the norm behind a joint. unfused: the norm's own."""

    def __init__(self, joint: Joint, unfused: Callable[[Tensor], Tensor]) -> None:
        self.joint, self.unfused = joint, unfused

    def __call__(self, hidden_states: Tensor) -> Tensor:
        y = self.joint.normed(hidden_states)
        return self.unfused(hidden_states) if y is None else y


class DecoderForward:
    """The forward of a decoder layer: line by line transformers' own, but that its joints add the residuals.

    attention, mlp: the joints behind the two blocks; None where the block holds no row-parallel layer of ours.
    """

    def __init__(self, layer: Any, attention: Joint | None, mlp: Joint | None) -> None:
        self.layer, self.attention, self.mlp = layer, attention, mlp

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        layer = self.layer
        residual = hidden_states
        hidden_states = layer.input_layernorm(hidden_states)
        with _offer(self.attention, residual):
            hidden_states, _ = layer.self_attn(
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        hidden_states = _add(self.attention, residual, hidden_states)

        residual = hidden_states
        hidden_states = layer.post_attention_layernorm(hidden_states)
        with _offer(self.mlp, residual):
            hidden_states = layer.mlp(hidden_states)
        return _add(self.mlp, residual, hidden_states)


def _offer(joint: Joint | None, residual: Tensor) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if joint is None else joint.offer(residual)


def _add(joint: Joint | None, residual: Tensor, hidden_states: Tensor) -> Tensor:
    return residual + hidden_states if joint is None else joint.add(residual, hidden_states)


def _only_captures(hooks: Mapping[int, Callable[..., Any]]) -> bool:
    return all(getattr(hook, "__module__", "") == CAPTURE for hook in hooks.values())
