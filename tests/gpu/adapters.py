"""Adapters on devices: eager, compiled and captured, a model gives the same bits, and its sums are right.

A small Llama of transformers', without and with `fuse_norms`, and an MLP by parallelize_module. Of two ranks, each with
a device: transformers gives a rank the device of its number.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

import tp_overlap_kernels as tpo
from tests.integrations import loaded
from tests.integrations.judged import check_joined, check_rows
from tests.integrations.loaded import Load
from tests.integrations.surroundings import integers
from tests.integrations.traced import traced
from tp_overlap_kernels.layers import counters, routing

DEVICE = "cuda"
MAX_M, MAX_N = 64, 128  # what the adapters ask for here
LAYERS, HIDDEN, INTERMEDIATE = 2, 128, 256
LENGTHS = (13, 7, 64)
PROMPT = torch.arange(1, 14).view(1, -1)
NEW_TOKENS = 4
Run = Callable[..., torch.Tensor]


@contextlib.contextmanager
def llama(rank: int) -> Iterator[str]:
    """A folder with a model of random weights that rank 0 has made. Biases would show if one were added twice."""
    from transformers import LlamaConfig, LlamaForCausalLM

    loaded.quiet()
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "vocab_size": 66}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            config = LlamaConfig(**sizes, **heads, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5)
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).to(torch.bfloat16)
            for name, param in model.named_parameters():
                nn.init.normal_(param, mean=float("norm" in name), std=1.0 if "embed" in name else 0.1)
            model.save_pretrained(folder)
        said = [folder]
        dist.broadcast_object_list(said, src=0)
        yield said[0]
        dist.all_gather_object([None] * dist.get_world_size(), None)  # nobody reads it any more


def apart(world_size: int) -> bool:
    """Whether each rank has a device; which one, transformers reads in LOCAL_RANK."""
    if world_size > torch.cuda.device_count():
        return False
    os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    return True


def sums_of_a_model_are_right(rank: int, world_size: int) -> None:
    """Every row-parallel sum, and every norm that is one call with it, against float64."""
    if not apart(world_size):
        return
    with llama(rank) as folder:
        for norms in (None, {}):
            seen = loaded.run(rank, world_size, Load(folder, norms=norms), PROMPT, NEW_TOKENS, PROMPT, PROMPT)
            calls, everyone = 2 * LAYERS * (NEW_TOKENS + 2), [None] * world_size
            assert seen.counted == {"fused": calls} | ({} if norms is None else {"fused with norm": calls})
            dist.all_gather_object(everyone, seen)
            whole = loaded.whole(folder, torch.bfloat16)
            assert len(seen.rows if norms is None else seen.joined) == 2 * LAYERS
            check_rows(whole, everyone)  # by every rank, which all have the same before them
            check_joined(whole, everyone, rounded_before=True)  # by decode's plan, and the norm behind it


def a_compiled_model_gives_the_same(rank: int, world_size: int) -> None:
    """As one graph, in which each row-parallel layer is one call."""
    for run, inputs, norm in models(rank, world_size):
        compiled_gives_the_same(run, inputs, 2 * LAYERS, f"gemm_all_reduce{norm}")


def a_captured_model_gives_the_same(rank: int, world_size: int) -> None:
    for run, inputs, _ in models(rank, world_size):
        captured_gives_the_same(run, inputs)


def models(rank: int, world_size: int) -> Iterator[tuple[Run, list[tuple], str]]:
    """(the model, as a function of inputs such as these; the inputs; what the name of its op ends in)"""
    if not apart(world_size):
        return
    inputs = [_tokens(length, seed) for seed, length in enumerate(LENGTHS)]
    with llama(rank) as folder:
        for norms in (None, {}):
            with loaded.parts(world_size, Load(folder, norms=norms)) as model, torch.no_grad():
                # A mask of its own: transformers makes another where it is traced, and attention then rounds otherwise.
                run = lambda ids, mask, model=model: model(ids, attention_mask=mask, use_cache=False).logits
                yield run, inputs, "" if norms is None else "_add_rms_norm"


def _tokens(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [1, T], mask [1, 1, T, T]: a token sees itself and those before it)"""
    ids = torch.randint(66, (1, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return ids, torch.ones(1, 1, length, length, dtype=torch.bool, device=DEVICE).tril()


def an_mlp_compiled_gives_the_same(rank: int, world_size: int) -> None:
    for run, inputs in mlps(world_size):
        compiled_gives_the_same(run, inputs, 1, "gemm_all_reduce")


def an_mlp_captured_gives_the_same(rank: int, world_size: int) -> None:
    for run, inputs in mlps(world_size):
        captured_gives_the_same(run, inputs)


def mlps(world_size: int) -> Iterator[tuple[Run, list[tuple]]]:
    """(an MLP by parallelize_module, its inputs); its sums are of small integers, and right to the last bit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from tp_overlap_kernels.integrations.torch_tp import OverlapRowwise

    if not apart(world_size):
        return
    up, down = integers((INTERMEDIATE, HIDDEN), -1, 1, 1), integers((HIDDEN, INTERMEDIATE), -1, 1, 2)
    down = down * (integers(tuple(down.shape), 0, 15, 3) == 0)  # sparse, so that sums stay small
    bias = integers((HIDDEN,), -8, 8, 4)
    mlp = nn.Sequential(nn.Linear(HIDDEN, INTERMEDIATE, bias=False), nn.ReLU(), nn.Linear(INTERMEDIATE, HIDDEN))
    mlp.load_state_dict({"0.weight": up, "2.weight": down, "2.bias": bias})
    mlp.to(DEVICE, torch.bfloat16)
    routing.reset_counters()
    try:
        plan = {"0": ColwiseParallel(), "2": OverlapRowwise(max_tokens=MAX_M)}
        model = parallelize_module(mlp, init_device_mesh(DEVICE, (world_size,)), plan)
        inputs = [_few(length, seed) for seed, length in enumerate(LENGTHS)]
        with torch.no_grad():
            for x in inputs:
                exact = (x.cpu().double() @ up.T).relu() @ down.T + bias
                assert torch.equal(model(x).cpu().double(), exact), f"eager, {x.shape}"
            assert counters() == {"fused": len(LENGTHS)}
            yield model, [(x,) for x in inputs]
    finally:
        tpo.close()


def _few(rows: int, seed: int) -> torch.Tensor:
    """Rows with four ones each, so that hidden values are small integers."""
    x = torch.zeros(rows, HIDDEN)
    x[torch.arange(rows)[:, None], torch.randint(HIDDEN, (rows, 4), generator=torch.Generator().manual_seed(seed))] = 1
    return x.to(DEVICE, torch.bfloat16)


# --- the same, eager and otherwise


def compiled_gives_the_same(run: Run, inputs: list[tuple], calls: int, op: str) -> None:
    """calls: of the op, in the one graph that torch.compile makes for all inputs."""
    eager = [run(*given).clone() for given in inputs]
    one_graph, found = traced(run, op)
    for given, expected in zip(inputs, eager, strict=True):
        assert torch.equal(one_graph(*given), expected), f"compiled, {given[0].shape}"
    assert found == [calls], found
    tpo.check()


def captured_gives_the_same(run: Run, inputs: list[tuple]) -> None:
    eager = [run(*given).clone() for given in inputs]
    for given, expected in zip(inputs, eager, strict=True):
        for turn, out in enumerate(captured(run, given)):
            assert torch.equal(out, expected), f"captured, {given[0].shape}, replay {turn}"
    tpo.check()


def captured(run: Run, given: tuple) -> Iterator[torch.Tensor]:
    """What three replays of a graph give, recorded with other inputs."""
    static = [x.clone() for x in given]
    static[0].zero_()
    run(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*static)
    static[0].copy_(given[0])
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        yield out


CHECKS = (
    sums_of_a_model_are_right,
    a_compiled_model_gives_the_same,
    a_captured_model_gives_the_same,
    an_mlp_compiled_gives_the_same,
    an_mlp_captured_gives_the_same,
)
