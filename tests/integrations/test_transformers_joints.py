"""What is joined to its norm in transformers' models, what is not and why: in one process, torch in the op's place.

The stand-in rounds as transformers does. So a model gives the same bits joined and as it was, unless a residual is
added twice or never, or a norm is not that of its input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.integrations import loaded
from tests.integrations.surroundings import heard
from tp_overlap_kernels.errors import InvalidInput
from tp_overlap_kernels.integrations.adoption import Adopted, Request
from tp_overlap_kernels.layers import counters, routing

transformers = pytest.importorskip(
    "transformers", "5.17", reason="needs transformers >= 5.17: pip install -e .[transformers]"
)

from tp_overlap_kernels.integrations import transformers_source as source  # noqa: E402
from tp_overlap_kernels.integrations.transformers_forwards import Joint, RowForward  # noqa: E402
from tp_overlap_kernels.integrations.transformers_norms import join  # noqa: E402

LAYERS, H = 3, 32
PROMPT = torch.arange(1, 8).view(1, -1)
SIZES = {
    "vocab_size": 40,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.fixture(autouse=True)
def op_stands_in(monkeypatch):
    """One rank's product is the sum, and the norm rounds as transformers' own."""

    def with_norm(self, x, weight, bias, residual, scale, eps):
        new_residual = residual + nn.functional.linear(x, weight, bias)
        hidden = new_residual.to(torch.float32)
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
        return scale * hidden.to(x.dtype), new_residual

    monkeypatch.setattr(Adopted, "__call__", lambda self, x, weight, bias: nn.functional.linear(x, weight, bias))
    monkeypatch.setattr(Adopted, "fuses", lambda self, *_: not self.declined)
    monkeypatch.setattr(Adopted, "with_norm", with_norm)
    routing.reset_counters()
    loaded.quiet()


def model_of(family: str, declined: str = "", **more: Any) -> Any:
    """A small model, whole, whose layers call the op as they would after from_pretrained."""
    config = getattr(transformers, f"{family}Config")(**SIZES | more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    for name, param in model.named_parameters():
        nn.init.normal_(param, mean=float("norm" in name), std=1.0 if "embed" in name else 0.1)
    return with_rows(model, declined)


def with_rows(model: nn.Module, declined: str) -> Any:
    for name, module in model.named_modules():
        if name.endswith((".o_proj", ".down_proj", ".c_proj")) and type(module) is nn.Linear:
            layer = Adopted(name, "none", 0, 2, module.out_features, module.in_features, False, False, declined)
            module.forward = RowForward(module, layer, module.forward)
    return model


def joined(model: nn.Module, required: bool = False) -> int:
    return join(model, Request("test", required=required))


def hidden_states(model: Any, **more: Any) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        output = model(PROMPT, output_hidden_states=True, **more)
        return (*output.hidden_states, output.logits)


def same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


# ---- families: (how many joints, what is counted of one pass)

FAMILIES = {
    "Llama": ({"attention_bias": True, "mlp_bias": True}, 2 * LAYERS, {}),
    "Qwen2": ({}, 2 * LAYERS, {}),
    "Qwen3": ({}, 2 * LAYERS, {}),
    "Mistral": ({}, 2 * LAYERS, {}),
    "SmolLM3": ({}, 2 * LAYERS, {}),
    "Gemma": ({}, 0, {"norm": 2 * LAYERS}),  # 1 + weight
    "Jais2": ({}, 0, {"norm": 2 * LAYERS}),  # LayerNorm
    "Starcoder2": ({}, 0, {"block": 2 * LAYERS}),  # dropout at the end of the blocks
    "Phi3": ({}, 0, {"decoder": 2 * LAYERS}),  # dropout before the residual is added
    "Olmo2": ({}, 0, {"decoder": 2 * LAYERS}),  # norms behind the blocks
    "Cohere": ({}, 0, {"decoder": 2 * LAYERS}),  # attention and MLP side by side
    "Qwen3Moe": (EXPERTS, LAYERS, {}),  # its experts are not nn.Linear
    "Qwen2Moe": (EXPERTS | {"shared_expert_intermediate_size": 16}, LAYERS, {"block": LAYERS}),  # a shared expert
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_joined_of_a_family_and_what_is_not(family):
    more, joints, apart = FAMILIES[family]
    model = model_of(family, **more)
    theirs = hidden_states(model)
    routing.reset_counters()
    with heard() as log:
        assert joined(model) == joints
    assert same(hidden_states(model), theirs)
    fused = {"fused with norm": joints} if joints else {}
    assert counters() == fused | {f"norm apart: {reason}": times for reason, times in apart.items()}
    assert any("stays apart from its norm" in line for line in log) == bool(apart)
    assert not any("runs apart from its norm" in line for line in log), "what was said once is said again"
    assert any("is one call with the residual" in line for line in log) == bool(joints)
    assert joined(model) == joints and same(hidden_states(model), theirs), "a second call changes nothing"


def test_a_generated_text_is_the_same_and_nothing_is_kept():
    model = model_of("Llama")
    theirs = loaded.greedy(model, PROMPT, 5)
    joined(model)
    assert loaded.greedy(model, PROMPT, 5) == theirs and counters() == {"fused with norm": 2 * LAYERS * 5}
    joints = [
        row.forward.joint for layer in model.model.layers for row in (layer.self_attn.o_proj, layer.mlp.down_proj)
    ]
    assert all(tensor is None for joint in joints for tensor in (joint.offered, joint.y, joint.new_residual))


@pytest.mark.parametrize(
    ("family", "says"), [("Gemma", "not an RMS norm as Llama's"), ("Phi3", "does not run as Llama's")]
)
def test_where_a_joint_is_required_there_is_one_or_an_error(family, says):
    with pytest.raises(InvalidInput, match=f"o_proj cannot be joined to a norm, and was required to be: .*{says}"):
        joined(model_of(family), required=True)


def test_a_model_without_layers_of_ours_is_refused():
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))
    with pytest.raises(InvalidInput, match=r"LlamaForCausalLM has no row-parallel layer of ours[.] Call enable"):
        joined(model)


def test_a_model_that_does_more_between_its_layers_keeps_the_joints_within_them(monkeypatch):
    forward = transformers.LlamaModel.forward

    def steered(self, *args, **kwargs):
        hidden_states = self.embed_tokens(args[0])
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings=self.rotary_emb(hidden_states, PROMPT - 1))
            hidden_states.add_(1)
        hidden_states = self.norm(hidden_states)
        return hidden_states

    assert source.hands_layer_to_layer(forward) and not source.hands_layer_to_layer(steered)
    model = model_of("Llama").model
    monkeypatch.setattr(transformers.LlamaModel, "forward", steered)
    with torch.inference_mode():
        theirs = model(PROMPT)
        assert joined(model) == LAYERS
        assert torch.equal(model(PROMPT), theirs)
    assert counters() == {"fused with norm": LAYERS, "norm apart: between": LAYERS}


# ---- what changes after the model was joined

COUNTED = dict[str, int]


def doubled(module: nn.Module, inputs: Any, output: Any) -> Any:
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


def steer(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    output.add_(1)


def steer_input(module: nn.Module, inputs: Any) -> None:
    inputs[0].add_(1)


class Wrapped(nn.Module):
    """As an adapter's layer around the one that was there."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return doubled(self, args, self.base(*args, **kwargs))


def wrap(name: str) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        owner, _, child = name.rpartition(".")
        parent = layer.get_submodule(owner)
        setattr(parent, child, Wrapped(getattr(parent, child)))

    return change


def override(name: str) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        module = layer.get_submodule(name)
        forward = type(module).forward
        module.forward = lambda *args, **kwargs: doubled(module, args, forward(module, *args, **kwargs))

    return change


def around(name: str) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        module = layer.get_submodule(name)
        forward = module.forward
        module.forward = lambda *args, **kwargs: doubled(module, args, forward(*args, **kwargs))

    return change


def hook(name: str, function: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda layer: layer.get_submodule(name).register_forward_hook(function)


def pre_hook(name: str, function: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda layer: layer.get_submodule(name).register_forward_pre_hook(function)


# name: (what is done to the decoder layer in the middle, its reason, how many joints it takes apart)
CHANGES = {
    "hook on o_proj": (hook("self_attn.o_proj", doubled), "hooks", 1),
    "hook on attention": (hook("self_attn", doubled), "hooks", 1),
    "hook on down_proj": (hook("mlp.down_proj", doubled), "hooks", 1),
    "hook on the MLP": (hook("mlp", doubled), "hooks", 1),
    "hook before the norm": (pre_hook("post_attention_layernorm", steer_input), "hooks", 1),
    "hook before the norm of another layer": (pre_hook("input_layernorm", steer_input), "hooks", 1),
    "hook behind the decoder layer": (hook("", steer), "hooks", 1),
    "hook before the decoder layer": (pre_hook("", steer_input), "hooks", 1),
    "o_proj wrapped": (wrap("self_attn.o_proj"), "replaced", 1),
    "down_proj wrapped": (wrap("mlp.down_proj"), "replaced", 1),
    "o_proj's forward wrapped": (around("self_attn.o_proj"), "replaced", 1),
    "norm's forward wrapped": (around("post_attention_layernorm"), "replaced", 1),
    "attention wrapped": (wrap("self_attn"), "replaced", 1),
    "MLP wrapped": (wrap("mlp"), "replaced", 1),
    "MLP overridden": (override("mlp"), "replaced", 1),
    "norm overridden": (override("post_attention_layernorm"), "replaced", 1),
    "norm of another layer overridden": (override("input_layernorm"), "replaced", 1),
    "o_proj overridden": (override("self_attn.o_proj"), None, 1),  # the layer is no longer ours: nobody counts it
    "decoder layer overridden": (override(""), "outside", 2),
    "norm's output": (hook("post_attention_layernorm", doubled), None, 0),  # what the norm gives is anybody's
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_comes_between_takes_the_joint_apart(change):
    spoil, reason, apart = CHANGES[change]
    theirs = model_of("Llama")
    spoil(theirs.model.layers[1])
    ours = model_of("Llama")
    joined(ours)
    spoil(ours.model.layers[1])
    if change.endswith("before the decoder layer"):  # the first norm's input is not the tensor of a joint
        spoil(theirs.model.layers[0]), spoil(ours.model.layers[0])
    routing.reset_counters()
    with heard() as log:
        states = hidden_states(ours)
    assert same(states, hidden_states(theirs))
    expected: COUNTED = {"fused with norm": 2 * LAYERS - apart}
    assert counters() == expected | ({f"norm apart: {reason}": apart} if reason else {})
    assert sum("runs apart from its norm" in line for line in log) == bool(reason)


def test_a_layer_that_is_called_by_itself_gives_its_own_sum():
    model, x = model_of("Llama"), torch.randn(3, H).bfloat16()
    layer = model.model.layers[1].self_attn.o_proj
    with torch.inference_mode():
        theirs = layer(x)
        joined(model)
        assert torch.equal(layer(x), theirs)
    assert counters() == {"norm apart: outside": 1}


def test_a_norm_that_is_given_another_tensor_norms_that():
    model, x = model_of("Llama"), torch.randn(*PROMPT.shape, H).bfloat16()
    layers = model.model.layers
    with torch.inference_mode():
        theirs = layers[1].input_layernorm(x)
        joined(model)
        layers[0](x, position_embeddings=model.model.rotary_emb(x, PROMPT - 1))
        assert torch.equal(layers[1].input_layernorm(x), theirs)
    assert counters() == {"fused with norm": 2}


def test_a_decoder_layer_that_raised_owes_nothing():
    model, x = model_of("Llama"), torch.randn(*PROMPT.shape, H).bfloat16()  # the shape of what was offered
    layer = model.model.layers[1].self_attn
    with torch.inference_mode():
        theirs = layer.o_proj(x)
        joined(model)
        handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            model(PROMPT)
        handle.remove()
        assert torch.equal(layer.o_proj(x), theirs)


def test_fewer_layers_than_were_joined():
    model = model_of("Llama")
    model.config.num_hidden_layers = 2
    theirs = hidden_states(model)
    joined(model)
    assert same(hidden_states(model), theirs)


def test_a_sum_that_is_changed_unseen_is_an_error_and_not_a_number(monkeypatch):
    model = model_of("Llama")
    joined(model)
    mlp = type(model.model.layers[0].mlp)
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: 2 * forward(self, x))
    with pytest.raises(
        InvalidInput, match=r"layers[.]0[.]mlp[.]down_proj: its sum holds the residual, and came back as"
    ):
        hidden_states(model)


def test_gradients_flow_as_they_did():
    model = model_of("Llama")
    joined(model)
    model(PROMPT).logits.float().sum().backward()
    assert all(param.grad is not None for param in model.parameters())
    assert counters() == {"norm apart: norm_grad": 2 * LAYERS}


def test_a_joint_that_is_required_says_which_call_is_apart():
    model = model_of("Llama")
    joined(model, required=True)
    model.model.layers[1].mlp.register_forward_hook(doubled)
    with pytest.raises(InvalidInput, match=r"layers[.]1[.]mlp.down_proj: its norm .* required to be: a hook between"):
        hidden_states(model)


def test_layers_that_were_declined_are_not_joined():
    model = model_of("Llama", declined="dtype")
    theirs = hidden_states(model)
    with heard() as log:
        assert joined(model) == 0 and same(hidden_states(model), theirs)
    assert counters() == {"norm apart: unfused": 2 * LAYERS} and len(log) == 2
    with pytest.raises(
        InvalidInput, match="o_proj cannot be joined to a norm, and was required to be: it was declined"
    ):
        joined(model_of("Llama", declined="dtype"), required=True)


def test_a_layer_whose_product_is_not_the_ops_adds_no_residual(monkeypatch):
    model = model_of("Llama")
    theirs = hidden_states(model)
    joined(model)
    monkeypatch.setattr(Adopted, "fuses", lambda self, *_: False)
    assert same(hidden_states(model), theirs) and counters() == {"norm apart: unfused": 2 * LAYERS}


ROWS = torch.zeros(2, 3, H, dtype=torch.bfloat16)
APART = {
    "f32 residual": (ROWS.float(), torch.bfloat16, "residual"),
    "another shape": (ROWS[:1], torch.bfloat16, "residual"),
    "a subclass": (nn.Parameter(ROWS, requires_grad=False), torch.bfloat16, "residual"),
    "f32 weight": (ROWS, torch.float32, "norm_weight"),
    "nothing amiss": (ROWS, torch.bfloat16, ""),
}


@pytest.mark.parametrize("case", APART)
def test_operands_that_the_op_does_not_take(case):
    residual, dtype, reason = APART[case]
    model = model_of("Llama")
    joined(model)
    joint: Joint = model.model.layers[0].mlp.down_proj.forward.joint
    assert joint.norm is not None
    joint.norm.to(dtype)
    with torch.inference_mode(), joint.offer(residual):
        assert joint.takes(torch.zeros(2, 3, 48, dtype=torch.bfloat16)) == (not reason)
    assert counters() == {f"norm apart: {reason}" if reason else "fused with norm": 1}


# ---- reading forwards


class Forwards:
    """Ends of blocks. The name says whether the layer's output is handed on."""

    def hands_on_named(self, x):
        y = self.o_proj(x)
        return y

    def hands_on_at_once(self, x):
        return self.o_proj(x)

    def hands_on_in_a_tuple(self, x):
        y, weights = x, None
        y = self.o_proj(y)
        return y, weights

    def keeps_doubled(self, x):
        y = self.o_proj(x)
        return 2 * y

    def keeps_two_at_once(self, x):
        y, x = self.o_proj(x), 2 * x
        return y, x

    def keeps_what_came(self, x):
        x = self.o_proj(x) if x else x
        return x

    def keeps_step_between(self, x):
        y = self.o_proj(x)
        y = y + 1
        return y

    def keeps_second_use(self, x):
        x = x + self.o_proj(x)
        y = self.o_proj(x)
        return y

    def keeps_second_place(self, x):
        y = self.o_proj(x)
        return x, y

    def keeps_slice(self, x):
        y[:] = self.o_proj(x)  # noqa: F821
        return y  # noqa: F821

    def keeps_branch(self, x):
        if x:
            return self.o_proj(x)


@pytest.mark.parametrize("name", [name for name in vars(Forwards) if not name.startswith("__")])
def test_whether_a_block_hands_on_what_its_last_layer_gives(name):
    assert source.hands_on(getattr(Forwards, name), "o_proj") == name.startswith("hands_on")


def test_a_forward_without_source_is_unknown():
    assert not source.hands_on(len, "o_proj") and not source.is_program(len, source.RMS_NORM)
