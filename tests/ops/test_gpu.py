"""The op tests on two devices, with two ranks and with four: `python -m pytest -m gpu tests/ops/test_gpu.py`.

tests/gpu holds the shapes of models; here are orders, forms and graphs. One start of the ranks serves all tests.
"""

from __future__ import annotations

import os
import pathlib
import socket
import traceback

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(280),
    pytest.mark.skipif(
        torch.cuda.device_count() < 2 or not torch.cuda.can_device_access_peer(0, 1),
        reason="needs two CUDA devices that reach each other",
    ),
]
NAMES = (  # of on_gpu.CHECKS, which is not imported where nothing can run
    "any_plan_after_any_other",
    "graphs_of_any_plans",
    "any_strides_and_a_bias",
    "more_rows_than_the_arena_holds",
    "host_cost",
)


def serve(rank: int, world_size: int, port: int, folder: str) -> None:
    """One rank: every check, and rank 0 writes what came of it."""
    devices = torch.cuda.device_count()
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    os.environ["TP_OVERLAP_TIMEOUT"] = "20"
    if devices < world_size:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    torch.cuda.set_device(rank % devices)
    import torch.distributed as dist

    import tp_overlap_kernels as tpo
    from tests.ops import on_gpu

    dist.init_process_group("nccl" if devices >= world_size else "gloo")
    for check in on_gpu.CHECKS:
        tpo.init(max_M=on_gpu.MAX_M, max_N=on_gpu.MAX_N)
        report = ""
        try:
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp(f"ranks_{request.param}")
    torch.multiprocessing.spawn(serve, (request.param, port, str(folder)), nprocs=request.param)
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_on_devices(reports, name):
    report = reports.get(name, "not run, since a check before it failed")
    if report != "ok":
        pytest.fail(report, pytrace=False)
