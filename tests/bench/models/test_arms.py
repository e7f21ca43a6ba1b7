"""Three arms of one model on CPU ranks: right sums in two, wrong ones in the third, and the model of transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.bench.models import ranked
from tp_overlap_kernels.bench import cases
from tp_overlap_kernels.bench.launch import World
from tp_overlap_kernels.bench.models.configs import MODELS, sizes_of
from tp_overlap_kernels.layers import counters, routing

pytest.importorskip("transformers", "5.17", reason="needs transformers >= 5.17: pip install -e .[transformers]")

PROMPT = (torch.arange(2 * 11) * 7 % 66).view(2, 11)
NEW_TOKENS = 6
PADDED, LENGTHS = 13, (5, 11)  # tokens of a padded prompt, and those that count, by slot


# ---- tasks, run on every rank


def generate(rank: int, world_size: int, kind: str) -> dict[str, Any]:
    """Per arm (tokens, logits, what was wrong, what was counted)."""
    from tp_overlap_kernels.bench.models.arms import ARMS
    from tp_overlap_kernels.bench.models.checked import watched
    from tp_overlap_kernels.bench.models.slots import SlotCache
    from tp_overlap_kernels.bench.models.steps import Decode, Prefill

    here = ranked.world(rank, world_size)
    sizes = dataclasses.replace(sizes_of("tiny"), kind=kind)
    seen: dict[str, Any] = {}
    with ranked.arms(here, sizes) as arms:
        for arm in ARMS:
            routing.reset_counters()
            cache = SlotCache(sizes, world_size, len(PROMPT), PROMPT.shape[1] + NEW_TOKENS, ranked.DTYPE, here.device)
            prefill, decode = Prefill(cache, *PROMPT.shape), Decode(cache)
            prefill.ids.copy_(PROMPT)
            with watched(arms, arm, here) as wrong, arms.active(arm) as model:
                logits = [prefill(model)]
                tokens = [cache.tokens.clone()]
                for _ in range(NEW_TOKENS - 1):
                    logits.append(decode(model))
                    tokens.append(cache.tokens.clone())
            seen[arm] = torch.stack(tokens, 1), torch.stack(logits, 1), wrong, counters()
    return seen


def in_float32(rank: int, world_size: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of greedy tokens by prefill and decode in slots, the second filled first and more tokens of it read; and
    of the same tokens in one pass by transformers, with its eager attention and masks and without a cache."""
    from tp_overlap_kernels.bench.models.sharded import sharded
    from tp_overlap_kernels.bench.models.slots import SlotCache
    from tp_overlap_kernels.bench.models.steps import Decode, Prefill

    here, sizes = ranked.world(rank, world_size), dataclasses.replace(sizes_of("tiny"), kind=kind)
    with torch.inference_mode():
        model, _ = sharded(sizes, here, torch.float32)
        cache = SlotCache(sizes, world_size, 2, 32, torch.float32, here.device)
        prefill, decode = Prefill(cache, 1, PADDED), Decode(cache)
        rows = {}
        for slot in (1, 0):
            prefill.ids.zero_()
            prefill.ids[:, : LENGTHS[slot]] = PROMPT[slot, : LENGTHS[slot]]
            prefill.filling.fill_(slot)
            prefill.last.fill_(LENGTHS[slot] - 1)
            rows[slot] = [(prefill(model)[0], cache.tokens[slot].clone())]
        for _ in range(NEW_TOKENS - 1):
            for slot, logits in enumerate(decode(model)):
                rows[slot].append((logits, cache.tokens[slot].clone()))
        model.config._attn_implementation = "eager"
        ours, theirs = [], []
        for slot, length in enumerate(LENGTHS):
            text = torch.cat([PROMPT[slot, :length], torch.stack([token for _, token in rows[slot]])])[None]
            theirs.append(model(text, use_cache=False).logits[0, length - 1 : -1])
            ours.append(torch.stack([logits for logits, _ in rows[slot]]))
    return torch.cat(ours), torch.cat(theirs)


def a_sum_that_lost_a_rank(rank: int, world_size: int) -> tuple[list[str], list[str]]:
    """What the check says of one layer, on this rank: of the sum, and of the sum where rank 1 sent nothing."""
    import torch.distributed as dist

    from tp_overlap_kernels.bench.models.checked import wrong_sum
    from tp_overlap_kernels.bench.truth import ONCE

    here: World = ranked.world(rank, world_size)
    torch.manual_seed(rank)
    x, weight = torch.randn(3, 5, 48).bfloat16(), torch.randn(32, 48).bfloat16()
    whole = x @ weight.T
    part = whole.clone() if rank == 0 else torch.zeros_like(whole)
    dist.all_reduce(whole)
    dist.all_reduce(part)
    return [wrong_sum(x, weight, out, here, ONCE) for out in (whole, part)]


def weights(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    with ranked.arms(ranked.world(rank, world_size)) as arms:
        from tp_overlap_kernels.integrations.adoption import local

        return {name: local(param).clone() for name, param in arms.model.named_parameters()}


# ---- tests


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_nccl_and_ours_are_right_and_give_equal_tokens_and_the_ceiling_is_not(ranks, kind):
    layers = 2 * sizes_of("tiny").layers
    for seen in ranks(2).run(generate, kind, timeout=240):
        tokens, logits, wrong, counted = seen["nccl"]
        assert wrong == [] and counted == {}
        assert seen["ours"][2] == [] and seen["ours"][3] == {"fused": layers * NEW_TOKENS}
        assert torch.equal(seen["ours"][0], tokens)
        said = seen["ceiling"][2]
        assert seen["ceiling"][3] == {} and not torch.equal(seen["ceiling"][1], logits)
        assert len(said) == layers * NEW_TOKENS and "down_proj" in said[1] and "tolerance" in said[1]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_slots_of_unequal_length_give_what_transformers_gives(ranks, kind):
    """In f32, where rounding hides nothing: positions, masks, padding, and heads of a group."""
    for ours, theirs in ranks(2).run(in_float32, kind, timeout=120):
        torch.testing.assert_close(ours, theirs)


def test_the_check_notices_that_a_rank_is_missing(ranks):
    for whole, part in ranks(2).run(a_sum_that_lost_a_rank, timeout=60):
        assert whole is None and "outside the tolerance" in part


def test_ranks_hold_different_shards_and_equal_copies(ranks):
    one, other = ranks(2).run(weights, timeout=120)
    for name, mine in one.items():
        divided = name.endswith("proj.weight") or name.startswith("lm_head")
        assert torch.equal(mine, other[name]) != divided, name
        assert mine.isfinite().all() and mine.dtype == torch.bfloat16


def test_sizes_are_those_of_the_layers_that_the_other_benchmark_times():
    for name in set(MODELS) & set(cases.MODELS):
        sizes, layers = MODELS[name], cases.MODELS[name]
        assert (sizes.hidden, sizes.heads * sizes.head_dim, sizes.intermediate) == (
            layers.hidden,
            layers.attention,
            layers.intermediate,
        )
    assert {"llama-3-8b", "qwen2.5-72b"} <= set(MODELS) & set(cases.MODELS)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: sizes_of("llama-2"), "there are llama-3-8b"),
        (lambda: sizes_of("llama-3-8b", 33), "between 1 and the 32"),
        (lambda: sizes_of("tiny").check_divides(4), "do not divide evenly over 4 ranks"),
        (lambda: sizes_of("tiny").check_divides(1), "nothing to reduce"),
    ],
    ids=["model", "layers", "heads", "one rank"],
)
def test_what_cannot_be_had_is_refused_with_a_sentence(call, says):
    with pytest.raises(ValueError, match=says):
        call()
