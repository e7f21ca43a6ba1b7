"""Every check of an op's inputs: the same when it is traced and when it runs, before any rank waits for another."""

from torch import Tensor, bfloat16, float16, is_grad_enabled

from ..errors import InvalidInput
from ..memory import arena as arenas

DTYPES = (bfloat16, float16)
DTYPE_NAMES = {bfloat16: "bfloat16", float16: "float16"}


def check_tensors(op: str, *tensors: Tensor | None) -> None:
    """One device, one supported dtype, no gradients."""
    first = tensors[0]
    assert first is not None
    if first.dtype not in DTYPES:
        raise InvalidInput(f"{op}: dtype must be bfloat16 or float16, got {first.dtype}. Convert the inputs.")
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype != first.dtype:
            raise InvalidInput(
                f"{op}: all tensors must have one dtype, got {first.dtype} and {tensor.dtype}. Convert one."
            )
        if tensor.device != first.device:
            raise InvalidInput(
                f"{op}: all tensors must be on one device, got {first.device} and {tensor.device}. Move one."
            )
        if tensor.requires_grad and is_grad_enabled():
            raise InvalidInput(
                f"{op}: this op has no backward, and an input of shape {tuple(tensor.shape)} requires grad. "
                "Call it under torch.inference_mode() or torch.no_grad(), or detach the input."
            )


def check_gemm(op: str, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """Shapes of a [..., K], b [N, K] and bias [N]."""
    check_tensors(op, a, b, bias)
    if a.dim() < 1 or b.dim() != 2:
        raise InvalidInput(
            f"{op}: a must be [..., K] and b [N, K], got shapes {tuple(a.shape)} and {tuple(b.shape)}. "
            "b is laid out as nn.Linear's weight."
        )
    if a.shape[-1] != b.shape[1]:
        raise InvalidInput(
            f"{op}: K must be equal in a [..., K] and b [N, K], got a {tuple(a.shape)} and b {tuple(b.shape)} "
            f"(K={a.shape[-1]} and {b.shape[1]}). Is b transposed, or not this rank's shard?"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != b.shape[0]):
        raise InvalidInput(f"{op}: bias must be [N] with N={b.shape[0]}, got shape {tuple(bias.shape)}.")


def check_norm(op: str, shape: tuple, residual: Tensor, weight: Tensor, eps: float) -> None:
    """What a norm adds to a sum of this shape [..., H]: residual [..., H], weight [H], eps."""
    if tuple(residual.shape) != tuple(shape):
        raise InvalidInput(
            f"{op}: residual must have the shape of the sum, {tuple(shape)}, got {tuple(residual.shape)}. "
            "Expand or reshape it."
        )
    if weight.dim() != 1 or weight.shape[0] != shape[-1]:
        raise InvalidInput(f"{op}: weight must be [H] with H={shape[-1]}, got shape {tuple(weight.shape)}.")
    if not 0 <= eps < float("inf"):
        raise InvalidInput(f"{op}: eps must be a number of at least 0, got {eps}. RMS norms use 1e-5 or 1e-6.")


def check_out(op: str, out: Tensor, like: Tensor, shape: tuple, name: str = "out") -> None:
    """The caller's own output tensor. name: what the op calls it."""
    if tuple(out.shape) != tuple(shape) or out.dtype != like.dtype or out.device != like.device:
        raise InvalidInput(
            f"{op}: {name} must have shape {tuple(shape)}, dtype {like.dtype} and device {like.device}, "
            f"got {tuple(out.shape)}, {out.dtype}, {out.device}."
        )
    if not out.is_contiguous():
        raise InvalidInput(f"{op}: {name} must be contiguous, got strides {out.stride()} for shape {tuple(out.shape)}.")


def check_apart(
    op: str,
    out: Tensor,
    *inputs: Tensor | None,
    may_be: Tensor | None = None,
    name: str = "out",
    other: str = "an input",
) -> None:
    """out spans none of the bytes that an input spans: it would change what other tiles, or peers, have yet to read.

    may_be: the input that out may be as a whole. name, other: what the op calls out and the inputs. Every call of an
    _out form asks, since addresses change: 1 us.
    """
    start = out.data_ptr()
    end = start + out.nbytes
    for tensor in inputs:
        if tensor is None:
            continue
        first = tensor.data_ptr()
        if first < end and first + _span_bytes(tensor) > start:
            if first == start and tensor.is_contiguous() and tensor is may_be:
                continue
            raise InvalidInput(
                f"{op}: {name} must not overlap {other}, got {name} of shape {tuple(out.shape)} over {other} of shape "
                f"{tuple(tensor.shape)}. Give it memory of its own."
            )


def _span_bytes(x: Tensor) -> int:
    if x.is_contiguous() or x.numel() == 0:
        return x.nbytes
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.itemsize


def check_arena(op: str, group_name: str, tensor: Tensor, N: int) -> arenas.Arena:
    """The group's arena, fit for this call. Errors: NotInitialised, GroupFailed, InvalidInput."""
    arena = arenas.get(group_name, op)
    arena.check()
    if tensor.device != arena.device:
        raise InvalidInput(
            f"{op}: group {group_name!r} was initialised for {arena.device}, got tensors on {tensor.device}. "
            "Move the tensors, or set the device before init."
        )
    if N > arena.layout.max_N:
        raise InvalidInput(
            f"{op}: N={N} exceeds max_N={arena.layout.max_N} of group {group_name!r}. "
            f"Call tp_overlap_kernels.init(group, max_M={arena.layout.max_M}, max_N={N}) on every rank, "
            "outside graph capture."
        )
    return arena
