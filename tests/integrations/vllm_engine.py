"""vLLM itself over two CPU ranks, as a program: what it generates, and what its workers have seen of the op, as JSON.

    TP_OVERLAP=auto python -m tests.integrations.vllm_engine MODEL eager|compiled [DTYPE]

The program ends with its engine, so that each run loads plugins anew.
"""

from __future__ import annotations

import json
import sys
from typing import Any

PROMPTS = [[7, 3, 11, 2, 19, 23, 5, 1, 40], [3, 1, 4, 1, 5], list(range(60, 77))]
NEW_TOKENS = 12
MAX_TOKENS = 96  # vLLM's budget, and so max_M
MARK = "seen by tests: "


class Ask:
    """vLLM adds this to its workers. Its methods are asked for by name."""

    def tp_overlap_seen(self) -> dict[str, Any]:
        from tp_overlap_kernels import counters
        from tp_overlap_kernels.memory.arena import all_arenas
        from tp_overlap_kernels.ops.reference import EPOCH

        arenas = all_arenas()
        return {
            "counted": counters(),
            "calls": [int(arena.control[EPOCH]) for arena in arenas],  # also those of graphs that nobody has traced
            "max_M": [arena.layout.max_M for arena in arenas],
        }


def main(folder: str, mode: str, dtype: str = "float16") -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        tensor_parallel_size=2,
        enforce_eager=mode == "eager",
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_batched_tokens=MAX_TOKENS,
        max_num_seqs=4,
        distributed_executor_backend="mp",
        worker_extension_cls=f"{__spec__.name}.{Ask.__name__}",  # by the name under which workers import it
    )
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    made = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedy, use_tqdm=False)
    tokens = [list(each.outputs[0].token_ids) for each in made]
    print(MARK + json.dumps({"tokens": tokens, "workers": engine.collective_rpc("tp_overlap_seen")}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
