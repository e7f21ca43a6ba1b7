"""Calls that have been checked and planned once: the next equal one goes straight to its output and its launch.

A call is known by everything that the checks and dispatch look at: op, shapes, strides, dtypes and devices of all
tensors, whether there is a bias, and what `force_plan` and `cpu_backend` say. What may differ between equal calls is
looked at each time: whether the group has failed, whether gradients are wanted (then the call is not known here, and
the checks say why), and whether addresses are multiples of 16 (if not, the kernels get copies, the ordinary way).

Prepared calls belong to the arena and go with it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, is_grad_enabled

from ..memory import arena as arenas
from ..memory.arena import Arena
from ..memory.turn import Turn
from .execute import choices

MAX_CALLS = 1024  # an arena remembers; a prepared call takes about 2 KB


class Behind(NamedTuple):
    """A launch behind a product of cuBLAS: how to multiply, what was launched, and the product that it read.

    product(a, b, bias, out): multiplies and returns what the launch reads; out itself, or a fresh tensor.
    """

    product: Callable[..., Tensor]
    issued: Any
    read: Tensor
    takes_bias: bool


class Prepared:
    """A known call. issue: the ordinary way to run it, checks and planning done; again: the short one, if there is any.

    turn: of the group, in which it is issued. shape, strides: of the output that the functional op returns.
    """

    __slots__ = ("again", "any_address", "issue", "product", "see", "shape", "strides", "takes_bias", "turn")

    def __init__(self, turn: Turn, issue: Callable[..., Any], out: Tensor, any_address: bool = False):
        self.turn, self.issue = turn, issue
        self.shape, self.strides = tuple(out.shape), out.stride()
        self.again: Callable[..., bool] | None = None
        self.product: Callable[..., Tensor] | None = None  # what comes before `again`
        self.see: Callable[[Tensor], None] | None = None  # shown b, where an address is not enough
        self.takes_bias = True  # whether `again` adds the bias; the product does otherwise
        self.any_address = any_address  # whether `again` takes addresses that are no multiples of 16

    def learn(self, issued: Any, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """The short way, from what a GEMM op has issued with these tensors the ordinary way; None: there is none."""
        if issued is None:
            return
        at = {"bias_ptr": (out if bias is None else bias).data_ptr(), "out_ptr": out.data_ptr()}
        if not isinstance(issued, Behind):
            self.again = issued.again(a_desc=a.data_ptr(), b_desc=b.data_ptr(), **at)
            self.see = getattr(issued, "see", None)
            return
        if not issued.takes_bias:
            del at["bias_ptr"]
        self.again = issued.issued.again(x_ptr=issued.read.data_ptr(), **at)
        if self.again is not None:
            self.product, self.takes_bias = issued.product, issued.takes_bias

    def learn_norm(self, issued: Any, **tensors: Tensor) -> None:
        """Likewise of an op that ends in a norm. tensors: x, residual, weight, y and new_residual, in this order."""
        if isinstance(issued, Behind):
            self.product, issued = issued.product, issued.issued
        if issued is not None:
            self.again = issued.again(**{f"{name}_ptr": tensor.data_ptr() for name, tensor in tensors.items()})

    def gemm(self, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Run a GEMM op."""
        with self.turn:
            if self.again is None or not self._gemm_again(self.again, a, b, bias, out):
                self.issue(a, b, bias, out)

    def _gemm_again(self, again: Callable[..., bool], a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> bool:
        """The short way. False: nothing was launched that counts, go the ordinary way."""
        out_ptr = out.data_ptr()
        bias_ptr = out_ptr if bias is None else bias.data_ptr()
        if self.product is None:
            a_ptr, b_ptr = a.data_ptr(), b.data_ptr()
            if self.see is not None:
                self.see(b)
            return not (a_ptr | b_ptr | bias_ptr | out_ptr) & 15 and again(a_ptr, b_ptr, bias_ptr, out_ptr)
        read = self.product(a, b, bias, out)  # lives until the launch is made
        x_ptr = read.data_ptr()
        at = (x_ptr, bias_ptr, out_ptr) if self.takes_bias else (x_ptr, out_ptr)
        return not (x_ptr | bias_ptr | out_ptr) & 15 and again(*at)

    def norm(self, x: Tensor, *others: Tensor) -> None:
        """Run an all-reduce and its norm. others: residual, weight, y, new_residual."""
        with self.turn:
            if self.again is None or not self._norm_again(self.again, x, *others):
                self.issue(x, *others)

    def gemm_norm(self, a: Tensor, b: Tensor, bias: Tensor | None, *others: Tensor) -> None:
        """Run a GEMM, its all-reduce and its norm. others: as above; the product goes to y on its way."""
        with self.turn:
            again, product = self.again, self.product
            if again is None or product is None or not self._norm_again(again, product(a, b, bias, others[2]), *others):
                self.issue(a, b, bias, *others)

    def _norm_again(self, again: Callable[..., bool], *tensors: Tensor) -> bool:
        addresses = [tensor.data_ptr() for tensor in tensors]
        return (self.any_address or not any(address & 15 for address in addresses)) and again(*addresses)

    def sum(self, x: Tensor, out: Tensor) -> None:
        """Run an all-reduce."""
        with self.turn:
            if self.again is not None:
                x_ptr, out_ptr = x.data_ptr(), out.data_ptr()
                if (self.any_address or not (x_ptr | out_ptr) & 15) and self.again(x_ptr, out_ptr):
                    return
            self.issue(x, out)


def key_of(op: str, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor | None = None) -> tuple:
    """By what a GEMM call is known."""
    key: tuple = (op, a.shape, a.stride(), a.dtype, a.device, b.shape, b.stride(), b.dtype, b.device, choices())
    for tensor in (bias, out):
        key += (None,) if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    return key


def sum_key_of(op: str, x: Tensor, out: Tensor | None = None) -> tuple:
    """By what an all-reduce is known."""
    key = (op, x.shape, x.stride(), x.dtype, x.device, choices())
    return key if out is None else (*key, out.shape, out.stride(), out.dtype, out.device)


def norm_key_of(op: str, eps: float, *tensors: Tensor | None) -> tuple:
    """By what a call that ends in a norm is known."""
    key: tuple = (op, eps, choices())
    for tensor in tensors:
        key += (None,) if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    return key


def recall(group_name: str, key: tuple, *inputs: Tensor | None) -> Prepared | None:
    """The known call; None if there is none, or if this one would be refused, so that the checks must say why.

    inputs: the tensors that must not require grad.
    """
    arena = arenas.find(group_name)
    if arena is None or arena.record.failed:
        return None
    call = arena.prepared.get(key)
    if call is not None and is_grad_enabled():
        for tensor in inputs:
            if tensor is not None and tensor.requires_grad:
                return None
    return call


def remember(arena: Arena, key: tuple, call: Prepared | None) -> None:
    """Keep a call that ran."""
    if call is not None:
        if len(arena.prepared) >= MAX_CALLS:
            arena.prepared.clear()
        arena.prepared[key] = call
