"""Processes: the group of them, sums over ranks, DDP."""

import os
import random
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from util.distributed import launchers

_patience = timedelta(minutes=30)  # the longest wait for another rank


class RendezvousError(RuntimeError):
    """The processes of a run don't find each other."""


def default_device() -> str:
    """ "cuda", "mps" or "cpu", whichever is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def init(device: str, seed: int, dist_url: str = "env://", timeout_minutes: float = 30) -> torch.device:
    """Join the process group that the environment describes, seed this rank's random numbers, and return its device.

    Raises UserError where the others do not come in time; later a wait for one of them ends as a RuntimeError.
    """
    place = torch.device(device)
    if place.type == "cuda":
        if place.index is None:
            place = torch.device("cuda", launchers.gpu_index(torch.cuda.device_count()))
        torch.cuda.set_device(place)
        torch.backends.cudnn.benchmark = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        _join("nccl" if place.type == "cuda" else "gloo", dist_url, timedelta(minutes=timeout_minutes))
    for seeder in (random.seed, np.random.seed, torch.manual_seed):
        seeder(seed + rank())
    return place


def _join(backend: str, dist_url: str, patience: timedelta) -> None:
    global _patience
    _patience = patience
    rank_here, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = dist_url if dist_url != "env://" else "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
    try:
        store, rank_here, world = next(td.rendezvous(dist_url, rank_here, world, timeout=patience))
        store.set_timeout(patience)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            store = td.PrefixStore(_fresh_name(store, rank_here, world, patience), store)
        td.init_process_group(backend, store=store, rank=rank_here, world_size=world, timeout=patience)
    except (TimeoutError, RuntimeError, ValueError) as error:
        raise RendezvousError(
            f"rank {rank_here} of {world} did not meet the others at {meeting} within {patience.total_seconds():g} s "
            f"(--dist_timeout): {str(error).splitlines()[0]}. Were all processes started, is that the first node's "
            "address, is the port free and open, and does GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME name the network?"
        ) from error


def _fresh_name(store: td.Store, rank_here: int, world: int, patience: timedelta) -> str:
    """A name that exactly the processes that live now agree on.

    torchrun's store outlives its restarts, and neither it nor the count of restarts, which a node that comes back
    starts again, tells a living process's words from a dead one's. So each rank shows a number nobody had before, and
    rank 0 answers to that number; who got an answer says so under the new name.
    """
    own = uuid.uuid4().hex
    if rank_here:
        store.set(f"here/{rank_here}", own)
        name = store.get(f"name for/{own}").decode()
        store.set(f"{name}/came/{rank_here}", own)
        return name
    end = time.monotonic() + patience.total_seconds()
    waiting = set(range(1, world))
    while waiting:
        for number in list(waiting):
            if store.check([f"here/{number}"]):
                store.set(f"name for/{store.get(f'here/{number}').decode()}", own)
            if store.check([f"{own}/came/{number}"]):
                waiting.remove(number)
        if time.monotonic() > end:
            raise TimeoutError(f"nothing was heard of rank {', '.join(map(str, sorted(waiting)))}")
        time.sleep(0.05)
    return own


def rank() -> int:
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    return td.get_world_size() if td.is_initialized() else 1


def cpu_group() -> td.ProcessGroup | None:
    """A group of all ranks that talks over the CPU: waits neither for the GPU nor for the exchange of gradients."""
    return td.new_group(backend="gloo", timeout=_patience) if td.is_initialized() else None


def print_rank0(*words: object) -> None:
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


def run_on_rank0(work: Callable[[], object]) -> object:
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


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What steps on this rank: of a sharded optimiser the part that is here."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def gather_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """All ranks call it before rank 0 takes the state_dict, which then is that of an optimiser on one process."""
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=0)


def zero_grad(optimizer: torch.optim.Optimizer) -> None:
    """Ready for the next update. Under DDP the gradients, views of its buckets, stay as zeros: freed, the first
    micro-batch of an accumulation would make them anew beside the buckets."""
    optimizer.zero_grad(set_to_none=not td.is_initialized())


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Its load_state_dict, on every rank with the state of one process."""
    optimizer.load_state_dict(state)
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        # It leaves Adam's step on the CPU, which the fused kernel refuses on a GPU (pytorch#124133), and keeps a second
        # copy of this rank's share.
        optimizer.state.clear()
        for parameter, kept in optimizer.optim.state.items():
            kept["step"] = kept["step"].to(parameter.device)


def broadcast_from_rank0(tensors: Iterable[Tensor]) -> None:
    """Give every rank rank 0's values, those that a checkpoint holds, in place."""
    if td.is_initialized():
        for tensor in tensors:
            td.broadcast(tensor, 0)


def unwrap(model: nn.Module) -> nn.Module:
    """The model without DDP around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def grad_sync(model: nn.Module, wanted: bool) -> AbstractContextManager:
    """Around a forward and backward: exchange gradients only in an accumulation's last micro-step."""
    if wanted or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
