"""The ops on real devices, two ranks on two GPUs and four ranks on the same two: `python -m pytest -m gpu tests/gpu`.

A start of the ranks is slow, so one serves all checks of a module (checks.py, mixtures.py); each check is a test here.
A module with NODES has its ranks on so many, which are parts of this host.
"""

import ast
import importlib
import importlib.metadata
import os
import pathlib
import socket
import traceback

import pytest
import torch

from tests.gpu.needs import TWO_GPUS

FOLDER = pathlib.Path(__file__).parent
MODULES = ("checks", "mixtures", "values", "peers", "words", "norms", "nodes", "nvshmem", "adapters")
NEEDS = {"nvshmem": "nvshmem4py-cu13"}  # a wheel, by module
pytestmark = TWO_GPUS


def names_of(module: str) -> list[str]:
    """The CHECKS of a module, read and not imported: nothing of it can run without a GPU."""
    for node in ast.parse((FOLDER / f"{module}.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CHECKS":
            return [name.id for name in node.value.elts]
    raise AssertionError(f"{module} has no CHECKS")


def is_installed(wheel: str | None) -> bool:
    try:
        return wheel is None or bool(importlib.metadata.version(wheel))
    except importlib.metadata.PackageNotFoundError:
        return False


def device_of(rank: int, world_size: int, devices: int, nodes: int) -> int:
    """Neither the ranks of a node share a device nor those of a place, as far as there are enough."""
    node, place = divmod(rank, world_size // nodes)
    return rank if devices >= world_size else (place + node) % devices


def serve(rank: int, world_size: int, port: int, module: str, folder: str) -> None:
    """One rank: every check, and rank 0 writes what came of it."""
    devices = torch.cuda.device_count()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "TP_OVERLAP_TIMEOUT": "20"}
    if devices < world_size:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    checks = importlib.import_module(f"tests.gpu.{module}")
    nodes = getattr(checks, "NODES", 1)
    torch.cuda.set_device(device_of(rank, world_size, devices, nodes))
    backend = "nccl" if devices >= world_size else "gloo"
    if nodes > 1:  # NCCL between the nodes and in them, where no two ranks of a group share a device
        os.environ["TP_OVERLAP_RANKS_PER_NODE"] = str(world_size // nodes)
        backend = backend if backend == "nccl" else "cpu:gloo,cuda:nccl"
    import torch.distributed as dist

    import tp_overlap_kernels as tpo
    from tests.ops.judge import count_in_f32

    count_in_f32()
    torch.set_num_threads(8)  # rank 0 judges; all ranks prepare
    dist.init_process_group(backend)
    for check in checks.CHECKS:
        report = ""
        try:
            tpo.init(max_M=checks.MAX_M, max_N=checks.MAX_N)
            with torch.no_grad():
                check(rank, world_size)
        except BaseException:
            report = traceback.format_exc()
        reports = [None] * world_size
        dist.all_gather_object(reports, report)
        if rank == 0:
            texts = [f"rank {r}:\n{text}" for r, text in enumerate(reports) if text]
            pathlib.Path(folder, check.__name__).write_text("\n".join(texts) or "ok")
        if any("CUDA error" in text for text in reports):
            break
        if any(reports):
            tpo.close()  # a group that failed is made anew for the next check
    os._exit(0)  # the devices may be in a state that no destructor expects


@pytest.fixture(scope="module", params=[2, 4], ids=["two ranks", "four ranks on two devices"])
def reports(request, tmp_path_factory):
    """report(module, name): what the check said; "ok" or tracebacks."""
    served: dict[str, pathlib.Path] = {}

    def report(module: str, name: str) -> str:
        if module not in served:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            served[module] = tmp_path_factory.mktemp(f"{module}_{request.param}")
            arguments = (request.param, port, module, str(served[module]))
            torch.multiprocessing.spawn(serve, arguments, nprocs=request.param)
        file = served[module] / name
        return file.read_text() if file.exists() else "not run, since a check before it failed"

    return report


@pytest.mark.parametrize(("module", "name"), [(m, name) for m in MODULES for name in names_of(m)])
def test_on_devices(reports, module, name):
    if not is_installed(NEEDS.get(module)):
        pytest.skip(f"needs {NEEDS[module]}: pip install 'tp-overlap-kernels[nvshmem]'")
    report = reports(module, name)
    if report != "ok":
        pytest.fail(report, pytrace=False)
