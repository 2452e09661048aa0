"""The process group: joining it, sums and broadcasts over ranks, DDP, and optimisers that are sharded over ranks.

A process that is alone has no group. Every function works there, too, as rank 0 of 1.
"""

import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import cache

import numpy as np
import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from util.distributed import launchers

_timeout = timedelta(minutes=30)  # the longest wait for another rank
JOIN_GRACE_S = 5.0  # how much longer joining may take: torch's own errors, which say more, come after the timeout
_connecting: threading.Thread | None = None  # the thread that joins the group


class RendezvousError(RuntimeError):
    """A process group that could not be set up, or not in time."""


# Setting up.


def default_device() -> str:
    """Return the best kind of device that this machine has: "cuda", else "mps", else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def init(device: str, seed: int, dist_url: str = "env://", timeout_minutes: float = 30) -> torch.device:
    """Choose this rank's device, join the process group that the environment describes, and seed the random numbers.

    On CUDA, cuDNN is restricted to deterministic algorithms.

    Args:
        device: "cuda", where each process takes a GPU of its own, or any other name of a device.
        seed: Seed of rank 0; every other rank adds its number.
        dist_url: Rendezvous address; "env://": MASTER_ADDR and MASTER_PORT.
        timeout_minutes: Longest wait for another rank, now and later.

    Returns:
        This rank's device.

    Raises:
        RendezvousError: The group could not be set up: ranks that did not come in time, a port in use, a bad address.
            (If a rank stops answering later, torch raises a RuntimeError.)
    """
    own_device = torch.device(device)
    if own_device.type == "cuda":
        if own_device.index is None:
            own_device = torch.device("cuda", launchers.gpu_index(torch.cuda.device_count()))
        torch.cuda.set_device(own_device)
        # The classifiers' patch embedding is a convolution. cudnn.benchmark chooses its algorithm by timing, and may
        # choose another after a restart: take a fixed one.
        torch.backends.cudnn.deterministic = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        _join_process_group(own_device, dist_url, timedelta(minutes=timeout_minutes))
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(seed + rank())
    return own_device


def _join_process_group(device: torch.device, dist_url: str, timeout: timedelta) -> None:
    """Join the process group within the timeout, whatever it is that answers at the address.

    Args:
        device: This rank's; "cuda" talks by NCCL, any other by gloo.
        dist_url: Rendezvous address; "env://": MASTER_ADDR and MASTER_PORT.
        timeout: Longest wait for another rank, now and later.

    Raises:
        RendezvousError: The group could not be set up.
    """
    global _timeout, _connecting
    _timeout = timeout
    own_rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = dist_url if dist_url != "env://" else "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)

    # Torch respects the timeout only if the other side speaks its protocol: a server of another kind, which accepts
    # the connection and then sends nothing, would block it for ever. So a separate thread connects, while this one
    # waits and can handle signals. A thread of ThreadPoolExecutor would keep the process from exiting: use a daemon.
    joined = Future()

    def join() -> None:
        try:
            joined.set_result(_connect(device, dist_url, own_rank, world, timeout))
        except BaseException as error:
            joined.set_exception(error)

    _connecting = threading.Thread(target=join, daemon=True)
    _connecting.start()
    try:
        joined.result(min(timeout.total_seconds() + JOIN_GRACE_S, threading.TIMEOUT_MAX))
    except (TimeoutError, RuntimeError, ValueError) as error:
        reason = (str(error) or "what listens there, if anything, does not answer as rank 0 would").splitlines()[0]
        raise RendezvousError(
            f"rank {own_rank} of {world} could not join the process group at {address} within "
            f"{timeout.total_seconds():g} s (--dist_timeout): {reason}. Check that all processes were started, that "
            "this is the first node's address, that the port is free and open, and that GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME names the network interface"
        ) from error
    _pause_before_forks()


@cache
def _pause_before_forks() -> None:
    """Make this process wait for 20 ms before it forks, for example loader processes; once for all its forks.

    Gloo's threads enter Python for a moment after an exchange. If the process forks at that moment, a lock stays locked
    in the new process, which then waits for ever. CPython has no such lock since 3.11.10 (its issue 112275).
    """
    if sys.version_info < (3, 11, 10):
        os.register_at_fork(before=lambda: time.sleep(0.02))


def _connect(device: torch.device, dist_url: str, own_rank: int, world: int, timeout: timedelta) -> None:
    """Meet the other ranks at the address, and set up torch's process group with them.

    Raises:
        TimeoutError, RuntimeError, ValueError: Ranks that did not come, a port in use, a bad address.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has a current device of its own
    store, own_rank, world = next(td.rendezvous(dist_url, own_rank, world, timeout=timeout))
    store.set_timeout(timeout)
    # Under torchrun the store may hold the keys of processes that have died: use a fresh part of it.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        store = td.PrefixStore(_agree_on_prefix(store, own_rank, world, timeout), store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    td.init_process_group(backend, store=store, rank=own_rank, world_size=world, timeout=timeout)


def exit_if_connecting(code: int) -> None:
    """End the process at once with this exit code if the thread that joins the group is still blocked; else do nothing.

    If that thread resumed while Python is shutting down, it would abort the process, with exit code 134.
    """
    if _connecting is not None and _connecting.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _agree_on_prefix(store: td.Store, own_rank: int, world: int, timeout: timedelta) -> str:
    """Agree with all living ranks on a prefix for the store's keys that no process of an earlier start has used.

    torchrun's store survives restarts, and keeps the keys of processes that have died. The number of restarts can't
    tell their keys apart, since a node that comes back counts from 0 again. So each rank publishes a random token under
    its own number. Rank 0 answers under that token with its own token, which becomes the prefix. The rank then confirms
    under the prefix that it has received the answer.

    Raises:
        TimeoutError: On rank 0: some ranks did not confirm in time.
        RuntimeError: On another rank: rank 0 did not answer in time.
    """
    own_token = uuid.uuid4().hex

    # Other ranks: publish the token, wait for the answer, confirm it.
    if own_rank:
        store.set(f"token of rank/{own_rank}", own_token)
        prefix = store.get(f"prefix for token/{own_token}").decode()
        store.set(f"{prefix}/confirmed/{own_rank}", own_token)
        return prefix

    # Rank 0: answer until all have confirmed. A token may be a dead process's, and be replaced by a living one's.
    deadline = time.monotonic() + timeout.total_seconds()
    waiting = set(range(1, world))
    while waiting:
        for other in list(waiting):
            if store.check([f"token of rank/{other}"]):
                other_token = store.get(f"token of rank/{other}").decode()
                store.set(f"prefix for token/{other_token}", own_token)
            if store.check([f"{own_token}/confirmed/{other}"]):
                waiting.remove(other)
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer from rank {', '.join(map(str, sorted(waiting)))}")
        time.sleep(0.05)
    return own_token


def rank() -> int:
    """Return this process's number in the group, from 0."""
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes in the group."""
    return td.get_world_size() if td.is_initialized() else 1


# Exchange between the ranks. All of them must call these functions, except print_rank0.


def cpu_group() -> td.ProcessGroup | None:
    """Create a group of all ranks that communicates over the CPU; None for a process that is alone.

    Its exchanges wait neither for the GPU nor for the exchange of gradients.
    """
    return td.new_group(backend="gloo", timeout=_timeout) if td.is_initialized() else None


def print_rank0(*values: object) -> None:
    """Print a line on rank 0 only, at once, and above the line of progress where there is one."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, values)), file=sys.stdout)
        sys.stdout.flush()


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Return each value summed over all ranks, in fp64."""
    if not td.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    td.all_reduce(total)
    return total.tolist()


def max_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Return the elementwise maximum over all ranks, on the CPU; for a process that is alone, `values` itself."""
    if not td.is_initialized():
        return values
    values = values.to(device, copy=True)
    td.all_reduce(values, td.ReduceOp.MAX)
    return values.cpu()


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks, through which gradients flow.

    Written by hand because torch.distributed.nn.functional.all_reduce is deprecated, and its replacement is private.
    """

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        td.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        # Each rank's loss depends on each rank's values: a value's gradient is the sum over the ranks' losses.
        return _SumOverRanks.apply(grad)


def differentiable_sum(values: Tensor) -> Tensor:
    """Return the elementwise sum over all ranks; gradients flow back through it to the values of every rank.

    Each rank's values receive the gradient of the sum of all ranks' losses. DDP's mean over the ranks is then the
    gradient of the mean loss, as it is without this exchange. If one rank runs the backward pass, all ranks must.
    """
    return _SumOverRanks.apply(values) if td.is_initialized() else values


def all_gather(value: object) -> list:
    """Return the values of all ranks, in the order of the ranks, on every rank."""
    if not td.is_initialized():
        return [value]
    values = [None] * world_size()
    td.all_gather_object(values, value)
    return values


def run_on_rank0(work: Callable[[], object]) -> object:
    """Call a function on rank 0 only, and return its result, or raise its exception, on all ranks.

    The exception's attribute `on_every_rank` then is True.
    """
    if not td.is_initialized():
        return work()
    outcome = [None, None]  # result, exception
    if rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    td.broadcast_object_list(outcome)
    if outcome[1] is not None:
        outcome[1].on_every_rank = True
        raise outcome[1]
    return outcome[0]


def broadcast_from_rank0(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors in place with rank 0's values."""
    if td.is_initialized():
        for tensor in tensors:
            td.broadcast(tensor, 0)


# DDP.


def wrap(model: nn.Module, device: torch.device, static_graph: bool = False) -> nn.Module:
    """Wrap a model in DDP if there are several ranks; every parameter must take part in the loss.

    Args:
        model: On its device.
        device: This rank's.
        static_graph: Every step runs the same graph and exchanges gradients (not with no_sync), of which DDP can make
            use.

    Returns:
        The wrapped model; for a process that is alone, the model itself.
    """
    if not td.is_initialized():
        return model
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=device_ids, gradient_as_bucket_view=True, static_graph=static_graph
    )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model without DDP around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def grad_sync(model: nn.Module, wanted: bool) -> AbstractContextManager:
    """Return a context for forward and backward in which DDP exchanges gradients only if wanted.

    They are wanted in the last micro-step of an accumulation group.
    """
    if wanted or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def zero_grad(optimizer: torch.optim.Optimizer) -> None:
    """Clear the gradients for the next update.

    Under DDP the gradients, which are views of its buckets, are set to zero rather than freed: freed, the first
    micro-batch of an accumulation group would allocate them anew beside the buckets.
    """
    optimizer.zero_grad(set_to_none=not td.is_initialized())


# Optimisers whose state is sharded over the ranks (--shard).


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimiser that steps on this rank: of a sharded one, this rank's part."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def gather_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Collect a sharded optimiser's state on rank 0, whose state_dict then is that of an optimiser on one process.

    All ranks must call before rank 0 takes the state_dict.
    """
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=0)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load into an optimiser, sharded or not, the state_dict of an optimiser on one process; all ranks must call.

    If the optimiser is sharded, the other ranks' entries in `state` are set to None.
    """
    optimizer.load_state_dict(state)
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        # It keeps a second copy of this rank's share.
        optimizer.state.clear()
        # It leaves Adam's step on the CPU, which the fused kernel refuses on a GPU (pytorch#124133).
        for parameter, parameter_state in optimizer.optim.state.items():
            parameter_state["step"] = parameter_state["step"].to(parameter.device)
