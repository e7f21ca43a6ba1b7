"""The arms of one model on CPU ranks: right sums in three, wrong ones in the ceiling, and the model of transformers."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from tests.bench.models import ranked
from tests.integrations.judged import no_worse
from tp_overlap_kernels.bench import cases
from tp_overlap_kernels.bench.launch import World
from tp_overlap_kernels.bench.models.configs import MODELS, sizes_of
from tp_overlap_kernels.layers import counters, routing

pytest.importorskip("transformers", "5.17", reason="needs transformers >= 5.17: pip install -e .[transformers]")

PROMPT = (torch.arange(2 * 11) * 7 % 66).view(2, 11)
NEW_TOKENS = 6
ARMS = ("nccl", "ours", "ours_sums", "ceiling")
ROW, OF_NORMS = "RowForward", {"DecoderForward", "NormForward"}
ROWS = ("self_attn.o_proj", "mlp.down_proj")  # of a decoder layer, in calling order
RMS_EPS = 0.01  # beside mean squares of 0.01 and more: a norm with another eps is another norm
PADDED, LENGTHS = 13, (5, 11)  # tokens of a padded prompt, and those that count, by slot


# ---- tasks, run on every rank


def generate(rank: int, world_size: int, kind: str) -> dict[str, Any]:
    """Per arm (logits, what was wrong, what was counted, which forwards of ours stood in the model), where all arms
    read the greedy tokens of nccl; "nccl again" is nccl behind all others, "f32" the logits of these weights in f32.
    """
    from tp_overlap_kernels.bench.models.checked import watched
    from tp_overlap_kernels.bench.models.sharded import sharded
    from tp_overlap_kernels.bench.models.slots import SlotCache
    from tp_overlap_kernels.bench.models.steps import Decode, Prefill
    from tp_overlap_kernels.integrations.adoption import local

    here = ranked.world(rank, world_size)
    sizes = dataclasses.replace(sizes_of("tiny"), kind=kind, rms_eps=RMS_EPS)
    seen: dict[str, Any] = {}
    tokens: list[torch.Tensor] = []

    def logits_of(model: Any, dtype: torch.dtype) -> torch.Tensor:
        cache = SlotCache(sizes, world_size, len(PROMPT), PROMPT.shape[1] + NEW_TOKENS, dtype, here.device)
        prefill, decode = Prefill(cache, *PROMPT.shape), Decode(cache)
        prefill.ids.copy_(PROMPT)
        logits = [prefill(model)]
        for step in range(NEW_TOKENS - 1):
            if len(tokens) == step:
                tokens.append(cache.tokens.clone())
            cache.tokens.copy_(tokens[step])
            logits.append(decode(model))
        return torch.stack(logits, 1)

    with ranked.arms(here, sizes) as arms:
        for name in (*ARMS, "nccl again"):
            arm = name.removesuffix(" again")
            routing.reset_counters()
            with watched(arms, arm, here) as wrong, arms.active(arm) as model:
                kinds = {type(vars(module).get("forward")).__name__ for module in model.modules()}
                seen[name] = logits_of(model, ranked.DTYPE), wrong, counters(), kinds & {ROW, *OF_NORMS}
        finer, _ = sharded(sizes, here, torch.float32)
        for theirs, mine in zip(finer.parameters(), arms.model.parameters(), strict=True):
            local(theirs).copy_(local(mine))
        seen["f32"] = logits_of(finer, torch.float32)
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

    here: World = ranked.world(rank, world_size)
    torch.manual_seed(rank)
    x, weight = torch.randn(3, 5, 48).bfloat16(), torch.randn(32, 48).bfloat16()
    whole = x @ weight.T
    part = whole.clone() if rank == 0 else torch.zeros_like(whole)
    dist.all_reduce(whole)
    dist.all_reduce(part)
    return [wrong_sum(x, weight, out, here) for out in (whole, part)]


def faulty(rank: int, world_size: int) -> dict[str, list[str]]:
    """What the check says of two passes of `ours`, by what the op with the norm was not given; and of arms that run the
    forwards of another one, by (arm, other)."""
    from tp_overlap_kernels.bench.models.checked import watched
    from tp_overlap_kernels.bench.models.slots import SlotCache
    from tp_overlap_kernels.bench.models.steps import Prefill
    from tp_overlap_kernels.integrations.adoption import Adopted

    op, here = Adopted.with_norm, ranked.world(rank, world_size)
    sizes = dataclasses.replace(sizes_of("tiny"), rms_eps=RMS_EPS)
    given = {
        "a rank": lambda x, residual, eps: (x if rank == 0 else 0 * x, residual, eps),
        "the residual": lambda x, residual, eps: (x, 0 * residual, eps),
        "eps": lambda x, residual, eps: (x, residual, 100 * eps),
        "nothing": lambda x, residual, eps: (x, residual, eps),
    }
    said = {}
    with ranked.arms(here, sizes) as arms:
        prefill = Prefill(SlotCache(sizes, world_size, 2, 16, ranked.DTYPE, here.device), *PROMPT.shape)
        prefill.ids.copy_(PROMPT)

        def passes(arm: str) -> list[str]:
            with watched(arms, arm, here) as wrong:
                prefill(arms.model)
                prefill(arms.model)
            return wrong

        for what, change in given.items():

            def with_norm(self, x, weight, bias, residual, scale, eps, change=change):
                x, residual, eps = change(x, residual, eps)
                return op(self, x, weight, bias, residual, scale, eps)

            Adopted.with_norm = with_norm  # type: ignore[method-assign]
            try:
                said[what] = passes("ours")
            finally:
                Adopted.with_norm = op  # type: ignore[method-assign]
        own = dict(arms.forwards)
        for arm, other in (("ours", "nccl"), ("ours", "ours_sums"), ("ours_sums", "nccl"), ("ours_sums", "ours_sums")):
            arms.forwards[arm] = own[other]
            said[arm, other] = passes(arm)
            arms.forwards[arm] = own[arm]
        with watched(arms, "ours", here) as said["ours", "then nccl"]:
            prefill(arms.model)
            with arms.active("nccl"):
                prefill(arms.model)
        assert all(type(own["ours"][name].layer) is Adopted for name in arms.rows), "what is watched stays so"
    return said


def refused(rank: int, world_size: int, kind: str, apart: str) -> str:
    """Why there are no arms of a model. apart: a layer that its plan does not divide by row."""
    import tp_overlap_kernels as tpo
    from tp_overlap_kernels.bench.models.arms import Arms
    from tp_overlap_kernels.bench.models.sharded import sharded

    model, mesh = sharded(
        dataclasses.replace(sizes_of("tiny"), kind=kind), ranked.world(rank, world_size), ranked.DTYPE
    )
    if apart:
        del model.tp_plan[apart]
    try:
        Arms(model, mesh, max_tokens=64)
    except tpo.InvalidInput as error:
        return str(error)
    finally:
        tpo.close()
    return ""


def weights(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    with ranked.arms(ranked.world(rank, world_size)) as arms:
        from tp_overlap_kernels.integrations.adoption import local

        return {name: local(param).clone() for name, param in arms.model.named_parameters()}


# ---- tests


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_ceiling_is_wrong_and_the_others_are_right_and_as_near_to_float32(ranks, kind):
    """`ours` rounds in fewer places than nccl, so its error is another one, and no larger but by chance: the factor
    allows as much again as all of nccl's, independent of it. Its tokens may differ where two logits are that near."""
    calls = 2 * sizes_of("tiny").layers * NEW_TOKENS
    for seen in ranks(2).run(generate, kind, timeout=240):
        exact = seen["f32"].flatten(0, 1)
        of_nccl, of_ours, of_sums, of_ceiling = (seen[arm][0].flatten(0, 1) for arm in ARMS)
        assert [seen[arm][1] for arm in ("nccl", "ours", "ours_sums", "nccl again")] == [[]] * 4
        assert seen["nccl"][2] == seen["ceiling"][2] == seen["nccl again"][2] == {}
        assert seen["ours"][2] == {"fused": calls, "fused with norm": calls} and seen["ours_sums"][2] == {
            "fused": calls
        }
        kinds = {"nccl": set(), "ours": {ROW, *OF_NORMS}, "ours_sums": {ROW}, "ceiling": set(), "nccl again": set()}
        assert {arm: seen[arm][3] for arm in kinds} == kinds
        assert torch.equal(of_sums.argmax(-1), of_nccl.argmax(-1))
        assert not torch.equal(of_ours, of_sums), "one arm was run as the other"
        no_worse(of_ours, of_nccl, exact, 2**0.5, "logits of ours")
        with pytest.raises(AssertionError, match="allowed"):
            no_worse(of_ceiling, of_nccl, exact, 2**0.5, "logits of the ceiling")
        assert torch.equal(seen["nccl again"][0], seen["nccl"][0]), "another arm has left something behind"
        said = seen["ceiling"][1]
        assert len(said) == calls and "down_proj" in said[1] and "tolerance" in said[1]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_slots_of_unequal_length_give_what_transformers_gives(ranks, kind):
    """In f32, where rounding hides nothing: positions, masks, padding, and heads of a group."""
    for ours, theirs in ranks(2).run(in_float32, kind, timeout=120):
        torch.testing.assert_close(ours, theirs)


def test_the_check_notices_that_a_rank_is_missing(ranks):
    for whole, part in ranks(2).run(a_sum_that_lost_a_rank, timeout=60):
        assert whole is None and "outside the tolerance" in part


def test_an_arm_of_ours_is_wrong_where_the_op_is_or_was_not_called(ranks):
    rows = [f"model.layers.{i}.{row}" for i in range(sizes_of("tiny").layers) for row in ROWS] * 2  # of two passes
    for said in ranks(2).run(faulty, timeout=120):
        assert said["nothing"] == said["ours_sums", "ours_sums"] == []
        for missing, result in (("a rank", "new_residual"), ("the residual", "new_residual"), ("eps", "y")):
            for line, row in zip(said[missing], rows, strict=True):
                assert line.startswith(f"ours: {row}: {result}: ") and "outside the tolerance" in line
        for arm, other in (("ours", "nccl"), ("ours", "ours_sums"), ("ours_sums", "nccl")):
            assert said[arm, other] == [f"{arm}: {row}: the op was not called" for row in rows]
        assert said["ours", "then nccl"] == said["ours", "nccl"][: len(rows) // 2], "only one pass was without the op"


@pytest.mark.parametrize(
    ("kind", "apart", "says"),
    [
        ("gemma", "", "o_proj cannot be joined to a norm, and was required to be: the norm"),
        ("llama", "model.layers.*.mlp.down_proj", "2 of 4 layers .* are joined to the norms behind them"),
    ],
    ids=["norm", "plan"],
)
def test_a_model_of_which_a_layer_is_not_joined_to_a_norm_is_refused(ranks, kind, apart, says):
    for said in ranks(2).run(refused, kind, apart, timeout=120):
        assert re.search(says, said)


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
