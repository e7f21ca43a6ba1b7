"""The ops on real devices: two ranks on two GPUs, and four ranks on the same two."""

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


def _rank(rank, W, port, folder):
    from tests.gpu import checks

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(W))
    if torch.cuda.device_count() < W:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    torch.cuda.set_device(rank % torch.cuda.device_count())
    import torch.distributed as dist

    import tp_overlap_kernels as tpo

    dist.init_process_group("nccl" if torch.cuda.device_count() >= W else "gloo")
    group = tpo.init(max_M=8192, max_N=8192).group_name
    for check in checks.CHECKS:
        report = ""
        try:
            with torch.no_grad():
                check(rank, W, group)
        except BaseException:
            report = traceback.format_exc()
        reports = [None] * W
        dist.all_gather_object(reports, report)
        if rank == 0:
            failed = "\n".join(f"rank {r}:\n{text}" for r, text in enumerate(reports) if text)
            (pathlib.Path(folder) / check.__name__).write_text(failed or "ok")
        if any("GroupFailed" in text or "CUDA error" in text for text in reports):
            break  # a failed group takes the rest with it
    torch.cuda.synchronize()
    os._exit(0)


@pytest.fixture(scope="module", params=[2, 4], ids=["W2", "W4_on_two_devices"])
def reports(request, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp(f"W{request.param}")
    torch.multiprocessing.spawn(_rank, (request.param, port, str(folder)), nprocs=request.param)
    return {path.name: path.read_text() for path in folder.iterdir()}


NAMES = (
    "plans_are_right",
    "sums_are_right",
    "graphs_replay",
    "late_ranks",
    "compiles",
    "growth_in_capture_is_refused",
    "failures_are_named",
)


@pytest.mark.parametrize("name", NAMES)
def test_on_devices(reports, name):
    report = reports.get(name, "not run, since a check before it failed")
    if report != "ok":
        pytest.fail(report, pytrace=False)
