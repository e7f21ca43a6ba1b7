"""bf16 and fp8 as numpy bit patterns: numpy has neither, and Triton's interpreter treats their bits as integers.

A value of these types is held as uint16 or uint8. `widen` gives the f32 that the bits stand for, exactly; `narrow`
rounds f32 to them, to nearest even, fp8 saturating as `cvt.satfinite` does. Arithmetic in f32 followed by one `narrow`
equals the correctly rounded bf16 operation for +, -, * and /, since 24 bits are at least twice bf16's 8 and two more.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl

_FP8 = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}  # by name: pointer types have no hash
_BF16_NAN = np.uint16(0x7FC0)


def is_bits(dtype: tl.dtype) -> bool:
    """Whether values of `dtype` (or of its elements) are held as bit patterns."""
    return dtype.scalar == tl.bfloat16 or dtype.scalar.name in _FP8


def widen(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """The f32 values of bit patterns; any other data comes back as it is."""
    if dtype.scalar == tl.bfloat16:
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype.scalar.name in _FP8:
        return torch.from_numpy(np.array(data, order="C")).view(_FP8[dtype.scalar.name]).float().numpy()
    return data


def narrow(values: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """The bit patterns of `dtype` nearest to `values`, ties to even."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype.scalar == tl.bfloat16:
        bits = values.view(np.uint32)
        last_kept_bit = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = (bits + last_kept_bit + np.uint32(0x7FFF)) >> np.uint32(16)
        return np.where(np.isnan(values), _BF16_NAN, rounded.astype(np.uint16))
    fp8 = _FP8[dtype.scalar.name]
    largest = torch.finfo(fp8).max
    return torch.from_numpy(values.copy()).clamp(-largest, largest).to(fp8).view(torch.uint8).numpy()
