"""The unfused ways to end in a norm: any of torch_providers.py, torch's addition, torch's fused RMS norm."""

from __future__ import annotations

import dataclasses

import torch

from .cases import ALL_REDUCE_NORM, GEMM_ALL_REDUCE_NORM, SUM_OF, Case
from .norm import EPS, norm_operands
from .provider import Session
from .timing import Call
from .torch_providers import AllReduceAlone, Gloo, GlooAlone, Nccl, OneShot, OneShotAlone, Unfused


class NormBehind(Unfused):
    """The sum as `way` makes it, and then the norm."""

    way: type[Unfused]

    def __init__(self, name: str, session: Session) -> None:
        super().__init__(name, session)
        self._way = self.way(name, session)

    def prepare(self, case: Case, a: torch.Tensor) -> Call:
        total = self._way.prepare(dataclasses.replace(case, op=SUM_OF[case.op]), a)
        residual, weight = norm_operands(case.layer, case.M, a.dtype, a.device)

        def call(w: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            partial = total(w)
            assert isinstance(partial, torch.Tensor)
            new_residual = partial + residual
            return torch.nn.functional.rms_norm(new_residual, weight.shape, weight, EPS), new_residual

        return call


def behind(sum_by: type[Unfused], op: str) -> type[NormBehind]:
    """The provider that sums so and norms then."""
    attributes = {"way": sum_by, "ops": (op,), "for_device": sum_by.for_device}
    return type(f"{sum_by.__name__}Norm", (NormBehind,), attributes)


NORMS: dict[str, type[Unfused]] = {
    "matmul+nccl+rms_norm": behind(Nccl, GEMM_ALL_REDUCE_NORM),
    "matmul+symm_mem_one_shot+rms_norm": behind(OneShot, GEMM_ALL_REDUCE_NORM),
    "matmul+gloo+rms_norm": behind(Gloo, GEMM_ALL_REDUCE_NORM),
    "copy+nccl+rms_norm": behind(AllReduceAlone, ALL_REDUCE_NORM),
    "copy+symm_mem_one_shot+rms_norm": behind(OneShotAlone, ALL_REDUCE_NORM),
    "copy+gloo+rms_norm": behind(GlooAlone, ALL_REDUCE_NORM),
}
