"""Helper of the tests that runs a function in several ranks at once."""

import os
import socket
import traceback
from pathlib import Path

import faults
import torch

from util.distributed import dist


def _rank(rank: int, world: int, port: int, work, args: tuple, out: Path) -> None:
    """Run work(*args) as one of the ranks; write its result to rank{rank}.pt, or a traceback to rank{rank}.txt."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        dist.init("cpu", 0, timeout_minutes=1)
        torch.save(work(*args), out / f"rank{rank}.pt")
        dist.all_gather(None)  # waits until every rank is done, since one that leaves ends the others' connections
    except BaseException:
        (out / f"rank{rank}.txt").write_text(traceback.format_exc())
        raise


def run(world: int, out: Path, work, *args) -> list:
    """Run work(*args) in several ranks.

    Args:
        world: Number of ranks.
        out: Folder for their results.
        work: Function at the top level of a module, which returns tensors and plain types.
        *args: Its arguments.

    Returns:
        The result of each rank.
    """
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [faults.process(_rank, rank, world, port, work, args, out) for rank in range(world)]
    codes = [faults.exit_code(process) for process in processes]
    assert not any(codes), "\n".join(path.read_text() for path in sorted(out.glob("*.txt")))
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(world)]
