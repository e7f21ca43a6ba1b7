"""What the plugins of serving engines share: when they act, and which row-parallel layers of an engine become ours.

vLLM's and SGLang's RowParallelLinear have one ancestor, and the attributes that are read here in common: input_size,
output_size, input_size_per_partition, params_dtype, input_is_parallel, reduce_results, quant_method, skip_bias_add.

| declined as     | because                                                                              |
| --------------- | ------------------------------------------------------------------------------------ |
| reduce_results  | the layer hands on its partial, and somebody else owes the sum                       |
| whole_input     | input_is_parallel=False: a call brings the columns of all ranks                      |
| quantised       | its quant method is not the engine's plain one                                       |
| lora            | the engine's adapters read the weight themselves and never call the layer            |
| batch_invariant | bits that do not depend on M were asked for, and the op chooses its kernel by M      |
| two_batches     | two threads call the layers, in an order that the ranks need not share               |
| compile_cache   | the engine's cache of compiled code could not tell graphs with the op from others    |
| no_hook         | the engine has not called what was to change the layer's forward                     |
| other_group     | its columns are divided over other ranks than those that are summed                  |
| other_sum       | the engine's settings give the sum another form: quantised, or scattered             |

To these come one_rank, dtype and topology (adoption.py). An engine adds what only it can see (vllm.py, sglang.py).
"""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..config import settings
from ..errors import InvalidInput
from .adoption import Adopted, Part, Request, settle, wanted

log = logging.getLogger(__name__)

LORA = ("lora", "LoRA is on, and its layers read the weight themselves. Serve without adapters, or merge them.")
BATCH_INVARIANT = (
    "batch_invariant",
    "batch-invariant results were asked for, and the op chooses its kernel, and with it the rounding, by M.",
)
TWO_BATCHES = ("two_batches", "two batches run at once, and the op needs all ranks to make its calls in one order.")


def asked(host: str) -> bool | None:
    """Whether the op is required, or None where the plugin is to do nothing: TP_OVERLAP is unset, or 0.

    An engine loads every plugin that is installed, in each of its processes: being installed asks for nothing.
    """
    return wanted(host, None, otherwise=False) if settings().overlap_is_set else None


def unavailable(host: str, required: bool, text: str) -> None:
    """The engine has no place for us. Errors: InvalidInput where the op is required; else a warning."""
    if required:
        raise InvalidInput(f"{host}: {text} TP_OVERLAP=auto leaves the layers to the engine.")
    log.warning("%s: not active: %s", host, text)


def speak_through(engine: str) -> None:
    """What the package says goes where the lines of the logger `engine` go, and from the same level on."""
    ours, theirs = logging.getLogger("tp_overlap_kernels"), logging.getLogger(engine)
    if not ours.handlers:
        ours.handlers, ours.propagate = list(theirs.handlers), theirs.propagate
    if ours.level == logging.NOTSET:
        ours.setLevel(theirs.level)


def settle_row_parallel(
    request: Request,
    name: str,
    module: Any,
    group: dist.ProcessGroup | None,
    plain: type,
    obstacle: tuple[str, str],
    summed_by: str = "its caller",
) -> Adopted:
    """`settle` for an engine's RowParallelLinear. plain: the quant method of weights that are not quantised.

    group: of the ranks that the layer is divided over; None where it is whole on each. obstacle: of the engine's
    settings, for all layers. summed_by: who owes the sum of a layer with reduce_results=False; empty where the adapter
    has taken it over.
    """
    if not module.reduce_results and summed_by:
        obstacle = ("reduce_results", f"reduce_results=False: its partial is summed by {summed_by}.")
    elif not module.input_is_parallel:
        obstacle = ("whole_input", "input_is_parallel=False, and the op takes this rank's columns.")
    elif type(module.quant_method) is not plain:
        obstacle = ("quantised", f"its quant method is {type(module.quant_method).__name__}, not {plain.__name__}.")
    part = Part(module.output_size, module.input_size_per_partition, module.params_dtype)
    return settle(request, name, group, part, obstacle)


def fused_output(layer: Adopted, module: nn.Module, x: Any, hindrance: str = "") -> Tensor | None:
    """The sum of a call, with the bias unless the module skips it; None where the engine is to run the call.

    hindrance: as `Adopted.fuses` takes it.
    """
    # Looked up in each call: weights are loaded after the decision, and engines empty, move and replace them.
    parameters = module._parameters
    weight, bias = parameters.get("weight"), None if module.skip_bias_add else parameters.get("bias")
    return layer(x, weight, bias) if layer.fuses(x, weight, bias, hindrance) else None
