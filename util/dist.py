"""Processes: start-up under torchrun or Open MPI, sums over ranks, DDP."""

import os
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm


def local_rank() -> int:
    """This process's rank on its machine as its launcher says it, also before the process group exists."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)))


def default_device() -> str:
    """"cuda", "mps" or "cpu", whichever is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def init(device: str, seed: int, dist_url: str = "env://", dist_on_itp: bool = False) -> torch.device:
    """Join the process group that the launcher describes (none: a single process), seed this rank's random numbers
    with seed + rank, and return its device.

    torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; with dist_on_itp Open MPI's variables are read instead.
    """
    if dist_on_itp:
        for name, theirs in (("RANK", "RANK"), ("WORLD_SIZE", "SIZE"), ("LOCAL_RANK", "LOCAL_RANK")):
            os.environ[name] = os.environ[f"OMPI_COMM_WORLD_{theirs}"]
    place = torch.device(device)
    if place.type == "cuda":
        if place.index is None:
            place = torch.device("cuda", local_rank())
        torch.cuda.set_device(place)
        torch.backends.cudnn.benchmark = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store, rank_here, world = next(td.rendezvous(dist_url, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun's store outlives a restart, and a process might dial the dead one's address that it finds there.
            store = td.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        td.init_process_group(
            "nccl" if place.type == "cuda" else "gloo", store=store, rank=rank_here, world_size=world
        )
    for seeder in (random.seed, np.random.seed, torch.manual_seed):
        seeder(seed + rank())
    return place


def rank() -> int:
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    return td.get_world_size() if td.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if td.is_initialized():
        td.barrier()


def say(*words: object) -> None:
    """Print on rank 0 only, at once."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)), file=sys.stdout)  # above the bar, where there is one
        sys.stdout.flush()


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Each value summed over all ranks, in fp64."""
    if not td.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    td.all_reduce(total)
    return total.tolist()


def gather(value: object) -> list:
    """Every rank's value, in the order of the ranks, on all ranks."""
    if not td.is_initialized():
        return [value]
    values = [None] * world_size()
    td.all_gather_object(values, value)
    return values


def from_rank0(work: Callable[[], object]) -> object:
    """Rank 0's result of work(), on all ranks; what it raises is raised on all."""
    if not td.is_initialized():
        return work()
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    td.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def max_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """The elementwise maximum over all ranks, on the CPU."""
    if not td.is_initialized():
        return values
    values = values.to(device, copy=True)
    td.all_reduce(values, td.ReduceOp.MAX)
    return values.cpu()


def wrap(model: nn.Module, device: torch.device, static: bool = False) -> nn.Module:
    """The model in DDP when there are several ranks, else the model itself. Every parameter takes part in the loss.

    static: every step runs the same graph and exchanges gradients (not with no_sync), which DDP can make use of.
    """
    if not td.is_initialized():
        return model
    places = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=places, gradient_as_bucket_view=True, static_graph=static)


def share_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's buffers (a probe's BatchNorm statistics), those that a checkpoint holds."""
    if td.is_initialized():
        for buffer in model.buffers():
            td.broadcast(buffer, 0)


def unwrap(model: nn.Module) -> nn.Module:
    """The model without DDP around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def grad_sync(model: nn.Module, wanted: bool) -> AbstractContextManager:
    """Around a forward and backward: exchange gradients only in an accumulation's last micro-step."""
    if wanted or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
