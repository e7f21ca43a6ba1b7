"""What ranks do with a model of transformers: load it in parts, run it, and hand back what was seen.

A model is a folder with config and weights, made once by the test's process; the whole model is judged there as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch

import tp_overlap_kernels as tpo
from tests.integrations.surroundings import heard
from tp_overlap_kernels.layers import counters, routing

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are folders: nothing is looked up, or reported, elsewhere


@dataclasses.dataclass(frozen=True)
class Load:
    """How ranks load a model. plan: the model's own, or a dict. enable: the arguments of `enable`; None: not called.

    norms: the arguments of `fuse_norms`; None: not called.
    """

    folder: str
    plan: Any = "auto"
    enable: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    norms: dict[str, Any] | None = None


@dataclasses.dataclass
class Joined:
    """One call of the op with a norm, as a rank saw it. x: this rank's input; scale: the norm's weight."""

    name: str
    x: torch.Tensor
    residual: torch.Tensor
    scale: torch.Tensor
    y: torch.Tensor
    new_residual: torch.Tensor


@dataclasses.dataclass
class Seen:
    """What one rank saw. rows: for each call of a row-parallel layer its name, this rank's input, and its output.

    joined: the calls that were one with residual and norm. Hooks would take them apart, so then there are no rows.
    """

    tokens: list[int]
    surprise: torch.Tensor
    hidden: list[torch.Tensor]
    rows: list[tuple[str, torch.Tensor, torch.Tensor]]
    joined: list[Joined]
    counted: dict[str, int]
    log: list[str]
    bytes: int


def whole(folder: str, dtype: torch.dtype) -> Any:
    """The model in one piece."""
    from transformers import AutoModelForCausalLM

    quiet()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@contextlib.contextmanager
def parts(world_size: int, load: Load) -> Iterator[Any]:
    """The model over all ranks; afterwards nothing is left of it, or of the adapter."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from tp_overlap_kernels.integrations import transformers as adapter

    quiet()
    tpo.close()  # an adapter would take what an earlier test has left, which may be on several nodes
    routing.reset_counters()
    if load.enable is not None:
        adapter.enable(**{"max_tokens": 64, **load.enable})
    try:
        config = DistributedConfig(tp_plan=load.plan, tp_size=world_size)
        model = AutoModelForCausalLM.from_pretrained(load.folder, dtype=load.dtype, distributed_config=config).eval()
        if load.norms is not None:
            adapter.fuse_norms(model, **load.norms)
        yield model
    finally:
        adapter.disable()
        tpo.close()


def run(
    rank: int,
    world_size: int,
    load: Load,
    prompt: torch.Tensor,
    new_tokens: int,
    text: torch.Tensor,
    long: torch.Tensor,
) -> Seen:
    """Greedy `new_tokens` after `prompt`, the surprise at `long`, then a pass over `text` with all that can be seen.

    All of shape [1, T]. That makes new_tokens + 2 passes. What was seen is handed back on the CPU.
    """
    with heard() as log, parts(world_size, load) as model, torch.inference_mode():
        prompt, text, long = (each.to(model.device) for each in (prompt, text, long))
        tokens = greedy(model, prompt, new_tokens)
        nats = surprise(model, long)
        rows = watch(model) if load.norms is None else []
        with joined_calls() as joined:
            hidden = model(text, output_hidden_states=True).hidden_states
        states = [state.cpu() for state in hidden]
        return Seen(tokens, nats.cpu(), states, rows, joined, counters(), log, tpo.memory_report().total_bytes)


def greedy(model: Any, prompt: torch.Tensor, new_tokens: int) -> list[int]:
    lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, **lengths)
    return made[0, prompt.shape[1] :].tolist()


def surprise(model: Any, text: torch.Tensor) -> torch.Tensor:
    """[T - 1] f32, the negative log-likelihood of each token; perplexity is exp of its mean."""
    logits = model(text, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, text[0, 1:], reduction="none")


def watch(model: Any) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """A list that fills with what goes in and out of o_proj and down_proj."""
    rows: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: rows.append((name, _kept(inputs[0]), _kept(output)))
            )
    return rows


@contextlib.contextmanager
def joined_calls() -> Iterator[list[Joined]]:
    """What goes in and out of the op with the norm meanwhile."""
    from tp_overlap_kernels.integrations.adoption import Adopted

    calls: list[Joined] = []
    op = Adopted.with_norm

    def seen(layer, x, weight, bias, residual, scale, eps):
        y, new_residual = op(layer, x, weight, bias, residual, scale, eps)
        calls.append(Joined(layer.name, *(_kept(each) for each in (x, residual, scale, y, new_residual))))
        return y, new_residual

    Adopted.with_norm = seen  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Adopted.with_norm = op  # type: ignore[method-assign]


def _kept(x: torch.Tensor) -> torch.Tensor:
    """What x is now, on the CPU."""
    return x.clone() if x.device.type == "cpu" else x.cpu()


def quiet() -> None:
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
