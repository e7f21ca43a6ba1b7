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
# Passes that want GPUs. `compile_sizes`: vLLM sets it together with the sizes of CUDA graphs, of which there are none.
COMPILED = {
    "compile_sizes": [],
    "pass_config": dict.fromkeys(("fuse_norm_quant", "fuse_act_quant", "fuse_attn_quant", "fuse_allreduce_rms"), False),
}


def compile_as_on_gpus() -> None:
    """Graphs in pieces around attention, kept on disk: on CPUs vLLM would take a simpler mode instead."""
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    before = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, config: Any) -> None:
        wanted = config.compilation_config.mode
        before(cls, config)
        if wanted == CompilationMode.VLLM_COMPILE:
            config.compilation_config.mode, config.compilation_config.backend = wanted, "inductor"

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def main(folder: str, mode: str, dtype: str = "float16") -> None:
    from vllm import LLM, SamplingParams

    if mode == "compiled":
        compile_as_on_gpus()
    engine = LLM(
        folder,
        tensor_parallel_size=2,
        enforce_eager=mode == "eager",
        compilation_config=COMPILED if mode == "compiled" else None,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_batched_tokens=MAX_TOKENS,
        max_num_seqs=4,
        distributed_executor_backend="mp",
        worker_extension_cls="tests.integrations.vllm_worker.Ask",
    )
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    made = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedy, use_tqdm=False)
    tokens = [list(each.outputs[0].token_ids) for each in made]
    print(MARK + json.dumps({"tokens": tokens, "workers": engine.collective_rpc("tp_overlap_seen")}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
