"""What transformers' forwards do, read from their source: joints are made only where every step between is known.

A forward that cannot be read, or that says the same in other words, counts as unknown.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

# 61 of transformers' decoder layers, Llama, Qwen2, Qwen3 and Mistral among them.
DECODER_LAYER = """
def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
            position_embeddings=None, **kwargs):
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states, _ = self.self_attn(
        hidden_states=hidden_states, attention_mask=attention_mask, position_ids=position_ids,
        past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **kwargs)
    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)
    hidden_states = self.mlp(hidden_states)
    hidden_states = residual + hidden_states
    return hidden_states
"""
RMS_NORM = """
def forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)
"""


def is_program(forward: Callable[..., Any], text: str) -> bool:
    """Whether `forward` has the arguments and the statements of `text`; annotations and docstrings aside."""
    return _statements(_parsed(forward)) == _statements(_function(text))


def hands_on(forward: Callable[..., Any], name: str) -> bool:
    """Whether `forward` ends with one call of self.<name>, the only one, and returns its value, perhaps in a tuple's
    first place."""
    function = _parsed(forward)
    if function is None or ast.unparse(function).count(f"self.{name}") != 1:
        return False
    *_, before, last = [ast.Pass(), *function.body]
    value = last.value if isinstance(last, ast.Return) else None
    if isinstance(value, ast.Tuple) and value.elts:
        value = value.elts[0]
    if isinstance(value, ast.Name) and isinstance(before, ast.Assign) and _is_name(before.targets, value.id):
        value = before.value
    return isinstance(value, ast.Call) and ast.unparse(value.func) == f"self.{name}"


def hands_layer_to_layer(forward: Callable[..., Any]) -> bool:
    """Whether a model's `forward` gives what each of self.layers returns to the next as it is, and the last's to
    self.norm."""
    function = _parsed(forward)
    if function is None or ast.unparse(function).count("self.layers") != 1:
        return False
    for loop, after in zip(function.body, function.body[1:], strict=False):
        if isinstance(loop, ast.For) and "self.layers" in ast.unparse(loop.iter):
            return _is_chain(loop) and ast.unparse(after) == "hidden_states = self.norm(hidden_states)"
    return False


def _is_chain(loop: ast.For) -> bool:
    """`for ..., layer in ...: hidden_states = layer(hidden_states, ...)`, and nothing else."""
    layer = loop.target.elts[-1] if isinstance(loop.target, ast.Tuple) else loop.target
    step = loop.body[0]
    if len(loop.body) != 1 or loop.orelse or not isinstance(step, ast.Assign) or not isinstance(step.value, ast.Call):
        return False
    call = step.value
    passes_on = bool(call.args) and ast.unparse(call.args[0]) == "hidden_states"
    return passes_on and _is_name(step.targets, "hidden_states") and ast.unparse(call.func) == ast.unparse(layer)


def _is_name(targets: list[ast.expr], name: str) -> bool:
    return len(targets) == 1 and isinstance(targets[0], ast.Name) and targets[0].id == name


def _parsed(forward: Callable[..., Any]) -> ast.FunctionDef | None:
    """The function behind any decorators, or None where it has no source."""
    try:
        return _function(inspect.getsource(forward))
    except (OSError, TypeError, SyntaxError):
        return None


def _function(text: str) -> ast.FunctionDef | None:
    function = ast.parse(textwrap.dedent(text)).body[0]
    return function if isinstance(function, ast.FunctionDef) else None


def _statements(function: ast.FunctionDef | None) -> list[str] | None:
    """Arguments with their defaults, then the statements, each as plain text."""
    if function is None:
        return None
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    texts = [ast.unparse(function.args), *(ast.unparse(statement) for statement in function.body)]
    return texts[:1] + texts[2:] if ast.get_docstring(function) is not None else texts
