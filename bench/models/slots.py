"""Keys and values in fixed places, and attention over them: what lets a step be captured once and replayed.

A *slot* is a sequence's place in a batch. Its length is a number on the device, so that slots of different lengths
decode together in one graph; transformers' StaticCache has one length for all of a batch. transformers asks a cache for
`update` alone where positions are given, and attention for the function that its registry holds under NAME. No mask
function is registered under that name, so transformers makes no mask: under capture it would make a whole one, even
where a causal kernel needs none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, Cache

from .configs import ModelSizes

NAME = "tp_overlap_slots"
ALIGNED_LENGTH = 64  # attention with a mask copies it in every layer where its rows are not aligned


class SlotCache(Cache):
    """`slots` sequences of up to `length` tokens each, for this rank's heads of every layer.

    tokens: int64 [slots], the last token of each slot, which a decode step reads. positions: int64 [slots], where that
    token goes; a step that would leave the cache stays at its last place. filling: int64 [B] slots that a prefill fills
    from their beginning; None in a decode step, which writes one token to every slot.
    """

    def __init__(
        self, sizes: ModelSizes, world_size: int, slots: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.length = -(-length // ALIGNED_LENGTH) * ALIGNED_LENGTH
        shape = (sizes.layers, slots, sizes.kv_heads // world_size, self.length, sizes.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.tokens)
        self.filling: Tensor | None = None
        self._rows = torch.arange(slots, device=device)
        self._places = torch.arange(self.length, device=device)

    def mask(self) -> Tensor:
        """[slots, 1, 1, length], 0 where a slot has a token after this step has written its own, else -inf."""
        seen = self._places <= self.positions[:, None]
        return torch.zeros_like(seen, dtype=self.keys.dtype).masked_fill_(~seen, -torch.inf)[:, None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """States: [B, heads, T, head_dim]. Returns what the step attends to: itself in a prefill, else all."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self.filling is not None:
            tokens = key_states.shape[2]
            keys[:, :, :tokens].index_copy_(0, self.filling, key_states)
            values[:, :, :tokens].index_copy_(0, self.filling, value_states)
            return key_states, value_states
        keys[self._rows, :, self.positions] = key_states[:, :, 0]
        values[self._rows, :, self.positions] = value_states[:, :, 0]
        return keys, values


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """query: [B, heads, T, head_dim]. Without a mask causal over T new tokens; with one, T = 1. Returns [B, T, ...].

    In a decode step the query heads of a key head are handed over as if they were tokens: keys and values are then read
    where they lie, and not first repeated for each query head.
    """
    batch, heads, tokens, head_dim = query.shape
    if mask is None:
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    else:
        grouped = query.reshape(batch, key.shape[1], -1, head_dim)
        mask = mask.expand(batch, 1, grouped.shape[2], mask.shape[-1])
        out = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
        out = out.reshape(batch, heads, tokens, head_dim)
    return out.transpose(1, 2), None


def register() -> None:
    """Makes `attention` known to transformers under NAME."""
    AttentionInterface.register(NAME, attention)
