"""The cases of `one-batch`: batches, prompts and outputs. Imports nothing heavy, so that bad ones fail at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class BatchCase:
    """`batch` prompts of `input_len` tokens, `output_len` tokens made for each: the first one by the prefill."""

    batch: int
    input_len: int
    output_len: int

    @property
    def decode_steps(self) -> int:
        return self.output_len - 1

    @property
    def label(self) -> str:
        return f"{self.batch} x {self.input_len} + {self.output_len}"


DEFAULT_CASES = tuple(
    BatchCase(batch, input_len, output_len)
    for batch in (1, 16, 64, 128)
    for input_len in (256, 512)
    for output_len in (32, 256)
) + tuple(BatchCase(1, input_len, 1) for input_len in (1000, 2000, 4000, 8000))
CPU_CASES = (BatchCase(1, 16, 1), BatchCase(2, 8, 4))


def parse_case(text: str) -> BatchCase:
    """`BATCHxINxOUT`. Errors: ValueError."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--case is BATCHxINPUTxOUTPUT, such as 16x512x32, of positive numbers; got {text!r}")
    return BatchCase(*map(int, parts))


def in_order(cases: tuple[BatchCase, ...], positions: int) -> tuple[BatchCase, ...]:
    """Without repetitions, the smallest prefills first, so that a budget cuts off the largest.

    Errors: ValueError where a case has more tokens than the model has positions.
    """
    for case in cases:
        if case.input_len + case.output_len > positions:
            raise ValueError(f"{case.label} tokens are more than the model's {positions} positions")
    return tuple(sorted(set(cases), key=lambda case: (case.batch * case.input_len, case)))


def parse_list(text: str, option: str) -> tuple[int, ...]:
    """Positive numbers between commas. Errors: ValueError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} is one or more positive numbers, such as 1,16; got {text!r}")
    return tuple(map(int, parts))


def product(batches: str | None, inputs: str | None, outputs: str | None) -> tuple[BatchCase, ...]:
    """Every combination of the lists; none where no list is given, and one of 512 + 32 tokens a prompt otherwise."""
    if batches is None and inputs is None and outputs is None:
        return ()
    return tuple(
        BatchCase(batch, input_len, output_len)
        for batch in parse_list(batches or "1", "--batch-size")
        for input_len in parse_list(inputs or "512", "--input-len")
        for output_len in parse_list(outputs or "32", "--output-len")
    )
