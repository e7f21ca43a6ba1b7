"""The operations of a program: what Triton's numpy builder lacks, gets wrong, or cannot check."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

from .number_formats import is_bits, narrow, widen
from .program import program_state

Handle = stock.TensorHandle
_RELEASING = (stock._ir.MEM_SEMANTIC.RELEASE, stock._ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


class Builder(stock.InterpreterBuilder):
    """One for all threads: where a program is in the grid is the thread's own."""

    grid_idx = property(lambda self: program_state().grid_position)
    grid_dim = property(lambda self: program_state().grid_size)

    def __init__(self) -> None:
        super().__init__()
        # debug: tl.device_assert asserts
        self.options = dataclasses.replace(stock.InterpreterOptions(), debug=True, sanitize_overflow=False)

    # --- numbers

    def get_bf16(self, value):
        return Handle(narrow(np.array([value]), tl.bfloat16), tl.bfloat16)

    def cast_impl(self, source, target):
        source_type, target_type = source.dtype.scalar, target.scalar
        is_pointer = isinstance(source_type, tl.pointer_type) or isinstance(target_type, tl.pointer_type)
        if is_pointer or not (is_bits(source_type) or is_bits(target_type)):
            return super().cast_impl(source, target)
        values = widen(source.data, source_type)
        if is_bits(target_type):
            return Handle(narrow(values, target_type), target_type)
        return Handle(values.astype(stock._get_np_dtype(target)), target_type)

    def create_fp_to_fp(self, source, target, rounding):
        if rounding == stock._ir.ROUNDING_MODE.RTZ:
            raise NotImplementedError("interpret: rounding toward zero")
        return self.cast_impl(source, target)

    def _through_f32(self, op, dtype, *handles):
        result = op(*(widen(handle.data, handle.dtype) for handle in handles))
        return Handle(result if result.dtype == np.bool_ else narrow(result, dtype), dtype.scalar)

    def binary_op(self, lhs, rhs, op):
        if not is_bits(lhs.dtype) or op in _BITWISE:
            return super().binary_op(lhs, rhs, op)
        return self._through_f32(op, lhs.dtype, lhs, rhs)

    def unary_op(self, arg, op):
        return self._through_f32(op, arg.dtype, arg) if is_bits(arg.dtype) else super().unary_op(arg, op)

    def create_clampf(self, arg, low, high, propagate_nans):
        if not is_bits(arg.dtype):
            return super().create_clampf(arg, low, high, propagate_nans)
        return self._through_f32(np.clip, arg.dtype, arg, low, high)

    def create_fma(self, x, y, z):
        if not is_bits(z.dtype):
            return super().create_fma(x, y, z)
        return self._through_f32(lambda a, b, c: a * b + c, z.dtype, x, y, z)

    def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        product = np.matmul(widen(a.data, a.dtype), widen(b.data, b.dtype), dtype=acc.data.dtype)
        return Handle(product + acc.data, acc.dtype.scalar)

    # --- memory: what the lint must know, and where a kernel may be spinning

    def create_masked_store(self, ptrs, value, mask, *policy):
        program_state().dirty |= value.data.size > 1
        return super().create_masked_store(ptrs, value, mask, *policy)

    def create_barrier(self, *_):
        program_state().barrier()

    def create_atomic_cas(self, ptr, expected, value, sem, scope):
        self._observe_atomic(value, sem, scope)
        return super().create_atomic_cas(ptr, expected, value, sem, scope)

    def create_atomic_rmw(self, op, ptr, value, mask, sem, scope):
        self._observe_atomic(value, sem, scope)
        if value.dtype.scalar == tl.bfloat16:
            return self._atomic_add_bf16(op, ptr, value, mask, sem)
        return super().create_atomic_rmw(op, ptr, value, mask, sem, scope)

    def _observe_atomic(self, value, sem, scope):
        """A scalar release is a signal, and so is any release at system scope. Other tile-wide atomics are stores of a
        tile, with a default order (acq_rel) that nobody meant."""
        program = program_state()
        is_scalar = value.data.size == 1
        if sem in _RELEASING and (is_scalar or scope == stock._ir.MEM_SYNC_SCOPE.SYSTEM) and not program.in_stand_in:
            program.check_release("atomic release")
        elif not is_scalar:
            program.dirty = True
        if is_scalar:  # perhaps one turn of a waiting loop
            program.check_stop()
            time.sleep(0)

    def _atomic_add_bf16(self, op, ptr, value, mask, sem):
        if op != stock._ir.ATOMIC_OP.FADD:
            raise NotImplementedError(f"interpret: atomic {op} on bf16")
        order = self.ir_sem_to_interpreter_sem[sem]
        before = np.zeros(value.data.shape, np.uint16)
        for index in np.ndindex(value.data.shape):
            if not mask.data[index]:
                continue
            address, addend = ptr.data[index].reshape(1), widen(value.data[index].reshape(1), tl.bfloat16)
            expected, found = None, np.zeros(1, np.uint16)
            while expected is None or found[0] != expected[0]:
                expected = found
                total = narrow(widen(expected, tl.bfloat16) + addend, tl.bfloat16)
                found = stock._interpreter.atomic_cas(address, expected, total, order)
            before[index] = found[0]
        return Handle(before, tl.bfloat16)

    # --- what has no meaning on a CPU

    def create_inline_asm(self, *_):
        raise NotImplementedError(
            "interpret: inline assembly. Give the device function around it a stand-in (cpu_impl)."
        )

    def create_extern_elementwise(self, *_):
        raise NotImplementedError("interpret: external code. Give the device function around it a stand-in (cpu_impl).")


def _cast(self, source, target):
    return self.cast_impl(source, target)


for _kind in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
    setattr(Builder, f"create_{_kind}", _cast)

builder = Builder()
semantic = stock.TritonSemantic(builder)
