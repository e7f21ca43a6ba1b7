"""Hugging Face transformers (5.17): its row-parallel linear layers, o_proj and down_proj as a rule, call the fused op.

    from tp_overlap_kernels.integrations import transformers as tpo_transformers

    tpo_transformers.enable(max_tokens=8192)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", distributed_config=DistributedConfig(tp_size=W))

The model's own plan stays: what changes is the meaning of `rowwise`, `rowwise_split_input` and `rowwise_rep` in it. A
plan may also name `tp_overlap_rowwise` and `tp_overlap_rowwise_split_input` for the layers that are meant; a layer that
is named so and cannot be fused is an error.
Shards, loading and saving are those of transformers' style, whose forward also serves every call that is declined
(adoption.py). What differs is rounding: transformers rounds the sum and then adds a bias to it; the op adds the bias
before the last rounding, once, where the plan's kernel says. TP_OVERLAP=0 leaves all to transformers.

`fuse_norms(model)`, after loading, makes one op of each such layer, the residual that its sum joins, and the norm.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

from torch import nn

from ..errors import InvalidInput
from . import transformers_norms
from .adoption import Request, adopt, wanted
from .transformers_forwards import RowForward

HOST = "tp_overlap_kernels for transformers"
VERSION = "5.17."
REPLACED = ("rowwise", "rowwise_split_input", "rowwise_rep")
ADDED = {"tp_overlap_rowwise": "rowwise", "tp_overlap_rowwise_split_input": "rowwise_split_input"}

log = logging.getLogger(__name__)


def enable(*, max_tokens: int | None = None, max_N: int = 1, required: bool | None = None) -> bool:
    """From now on models are loaded with the fused op. Returns whether TP_OVERLAP lets it be so.

    Every rank calls it, with equal arguments, before `from_pretrained`, which makes the arena before it loads weights.
    max_tokens: rows of the largest call that runs in one piece, the batch times the longest prompt; default
    TP_OVERLAP_MAX_TOKENS. max_N: columns of the arena, where other callers need more than the model's layers.
    required: layers and calls that cannot be fused are errors; default TP_OVERLAP=1, and layers that a plan names
    `tp_overlap_...`.
    Calling it again replaces the arguments, for models that are loaded afterwards; see `disable`.
    Errors: InvalidInput for an argument that TP_OVERLAP contradicts, and where transformers has no such styles.
    """
    styles = _registry()
    disable()
    of_all, of_named = wanted(HOST, required, otherwise=False), wanted(HOST, required, otherwise=True)
    if of_all is None or of_named is None:
        log.info("%s: off, by TP_OVERLAP=0", HOST)
        styles.update({name: styles[parent] for name, parent in ADDED.items()})  # plans that name them still load
        return False
    named = Request(HOST, max_tokens, max_N, of_named)
    added = {name: OverlapStyle(styles[parent], named) for name, parent in ADDED.items()}
    request = Request(HOST, max_tokens, max_N, of_all, named.said)
    styles.update({name: OverlapStyle(styles[name], request) for name in REPLACED} | added)
    return True


def disable() -> None:
    """Models that are loaded from now on are transformers' own. The arena stays: `close` frees it."""
    styles = _registry()
    for name in (*REPLACED, *ADDED):
        if name in styles._local_mapping:
            del styles[name]


def fuse_norms(model: nn.Module, *, required: bool | None = None) -> int:
    """Joins the row-parallel layers of a loaded model to the norms behind them; returns how many are joined.

    Where a decoder layer adds a residual to the layer's sum, and an RMS norm comes next, the three become one
    `gemm_all_reduce_add_rms_norm`. It rounds otherwise than transformers (see that op), hence this call of its own.
    model: loaded after `enable`, equal on all ranks, in its final form; hooks and adapters that come later take the
    joint apart again. What is not recognised, and calls that do not fit, run as they would without this call; the
    reason is counted and logged (transformers_norms.py, transformers_forwards.py). A second call changes nothing.
    required: what is not joined is an error; default TP_OVERLAP=1. With TP_OVERLAP=0 nothing is done.
    Errors: InvalidInput where a joint is required and there is none, and for a model without layers of ours.
    """
    _registry()
    of_all = wanted(HOST, required, otherwise=False)
    if of_all is None:
        log.info("%s: norms are left alone, by TP_OVERLAP=0", HOST)
        return 0
    return transformers_norms.join(model, Request(HOST, required=of_all))


class OverlapStyle:
    """A parallel style of transformers, told apart from its parent by the forward that it installs."""

    def __init__(self, parent: Any, request: Request) -> None:
        self.parent, self.request = parent, request
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()

    def validate_param(self, module: nn.Module, param: str, mesh: Any, parameter_name: str | None = None) -> None:
        self._names[module] = (parameter_name or param).rpartition(".")[0]  # the only place that is told the name
        self.parent.validate_param(module, param, mesh, parameter_name=parameter_name)

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        self.parent.shard_param(module, param, mesh)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        self.parent.install_forward(module, mesh)
        unfused = module.forward
        group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
        layer = adopt(
            self.request,
            self._names.get(module) or type(module).__name__,
            module,
            group,
            split_input=self.parent.input_layouts.is_replicate(),
            gives_sum=self.parent.output_layouts.is_replicate(),
        )
        module.forward = RowForward(module, layer, unfused)
        return module


def _registry() -> Any:
    install = "pip install 'tp-overlap-kernels[transformers]'"
    try:
        from transformers import __version__
        from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
    except ImportError as error:
        raise InvalidInput(f"{HOST}: transformers 5.17 is needed ({error}). {install}") from error
    if not __version__.startswith(VERSION):  # 5.23 does not shard the weights of plan values that are not its own
        raise InvalidInput(f"{HOST}: transformers {VERSION}x is needed, found {__version__}. {install}")
    return ALL_PARALLEL_STYLES
