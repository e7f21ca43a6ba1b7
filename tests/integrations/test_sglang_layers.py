"""Each sum is made once in SGLang's own decoder layers, with the plugin and without. `make engines` runs this."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.dist import RankPool
from tests.integrations.sglang_layers import HIDDEN, LAYERS, ROWS, run
from tests.integrations.sglang_stand_in import DECODERS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs SGLang 0.5.23: make engines"),
]
CALLS = 2 * LAYERS * len(ROWS)  # of o_proj and down_proj


@pytest.fixture(scope="module")
def pool() -> Iterator[Callable[[str | None], RankPool]]:
    """Two ranks that live with or without the plugin: SGLang does not give hooks back."""
    pools: dict[str | None, RankPool] = {None: RankPool(2), "auto": RankPool(2)}
    yield pools.__getitem__
    for each in pools.values():
        each.close()


@pytest.fixture(params=DECODERS)
def model(request, tmp_path) -> tuple[str, str]:
    """(its module in SGLang, a folder with a configuration)"""
    config = {
        "architectures": [f"{request.param.capitalize()}ForCausalLM"],
        "model_type": request.param,
        "hidden_size": HIDDEN,
        "intermediate_size": 512,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return request.param, str(tmp_path)


@pytest.mark.parametrize("spoil", [False, True], ids=["fused", "declined"])
def test_each_sum_is_made_once(pool, model, spoil):
    theirs = pool(None).run(run, *model, None, spoil, timeout=300)
    ours = pool("auto").run(run, *model, "auto", spoil, timeout=300)
    for (outputs, sums, counted), (expected, their_sums, nothing) in zip(ours, theirs, strict=True):
        assert their_sums == CALLS and nothing == {}
        assert (sums, counted) == ((CALLS, {"unfused: weight": CALLS}) if spoil else (0, {"fused": CALLS}))
        # Two ranks: the one addition rounds alike, in whichever order.
        assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
        assert all(output.isfinite().all() and output.std() > 0.1 for output in outputs)
