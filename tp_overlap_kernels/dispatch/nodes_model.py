"""What a sum over ranks on several nodes costs behind its GEMM, by bytes over links alone. Pure.

No latency, no launch, no contention: perfect pipelining in a flat ring. Told, with a table, in docs/performance.md.
"""

from dataclasses import dataclass

# GB/s of a rank, each way: NVLink as the copy engine fills it on 2 x H200, and one port of 400 Gb/s a GPU.
INSIDE_GBPS, BETWEEN_GBPS = 390.0, 50.0


@dataclass(frozen=True)
class Times:
    """Microseconds. hop: all of the sum but a rank's own share over its link in the node; across: a rank's share over
    the network, once each way for a reduce-scatter, twice for an all-reduce."""

    hop: float
    across: float
    flat: float

    def two_level(self, op: str) -> float:
        """The scatter inside hides behind the GEMM, where there is one."""
        if op == "gemm_reduce_scatter":
            return self.across
        return 2 * self.across + self.hop * (2 if op == "all_reduce" else 1)

    def one_level(self, op: str) -> float:
        return self.flat if op == "gemm_reduce_scatter" else 2 * self.flat


def times(
    sum_bytes: int, nodes: int, per_node: int, inside: float = INSIDE_GBPS, between: float = BETWEEN_GBPS
) -> Times:
    """sum_bytes: M * N * itemsize. inside, between: GB/s of a rank each way."""
    hop = (per_node - 1) / per_node * sum_bytes / inside / 1e3
    share = sum_bytes / per_node / between / 1e3
    flat = (1 - 1 / (nodes * per_node)) * max(share, hop)
    return Times(hop, (nodes - 1) / nodes * share, flat)
