"""The sizes of models, as their makers have published them in `config.json` on the Hugging Face Hub.

What stands here is all that the forward pass needs; weights are random (sharded.py). `tiny` is nobody's: it is what
CPU ranks run in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ModelSizes:
    """A decoder with grouped-query attention and a gated MLP."""

    name: str
    kind: str  # transformers' model_type: "llama", or "qwen2", whose q, k and v have biases
    source: str  # where the numbers are published
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    rope_theta: float
    rms_eps: float
    positions: int
    published_layers: int = 0  # where `layers` was cut

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def cut(self, layers: int | None) -> ModelSizes:
        """The same with fewer layers; None leaves all. Errors: ValueError where it has not so many."""
        if layers is None:
            return self
        if not 1 <= layers <= self.layers:
            raise ValueError(f"--layers is between 1 and the {self.layers} of {self.name}, got {layers}")
        return replace(self, layers=layers, published_layers=self.layers)

    def check_divides(self, world_size: int) -> None:
        """Errors: ValueError where one rank would be alone, or where a dimension leaves ranks with unequal shares."""
        if world_size < 2:
            raise ValueError("one rank has nothing to reduce. Give --ranks 2 or more.")
        sizes = {"key heads": self.kv_heads, "heads": self.heads, "intermediate": self.intermediate}
        for what, size in (sizes | {"vocabulary": self.vocab}).items():
            if size % world_size:
                raise ValueError(
                    f"{self.name}: {what} ({size}) do not divide evenly over {world_size} ranks "
                    f"(remainder {size % world_size}). Choose other --ranks."
                )


MODELS = {
    "llama-3-8b": ModelSizes(
        name="llama-3-8b",
        kind="llama",
        source="huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json",
        hidden=4096,
        intermediate=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        vocab=128256,
        rope_theta=500000.0,
        rms_eps=1e-5,
        positions=8192,
    ),
    "qwen2.5-72b": ModelSizes(
        name="qwen2.5-72b",
        kind="qwen2",
        source="huggingface.co/Qwen/Qwen2.5-72B-Instruct/blob/main/config.json",
        hidden=8192,
        intermediate=29568,
        layers=80,
        heads=64,
        kv_heads=8,
        vocab=152064,
        rope_theta=1000000.0,
        rms_eps=1e-6,
        positions=32768,
    ),
    "tiny": ModelSizes(
        name="tiny",
        kind="llama",
        source="none: made for CPU ranks",
        hidden=96,
        intermediate=144,
        layers=2,
        heads=6,
        kv_heads=2,
        vocab=66,
        rope_theta=10000.0,
        rms_eps=1e-5,
        positions=512,
    ),
}


def sizes_of(name: str, layers: int | None = None) -> ModelSizes:
    """The model of a name, cut to `layers`. Errors: ValueError with the names there are."""
    if name not in MODELS:
        raise ValueError(f"no model is called {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name].cut(layers)
