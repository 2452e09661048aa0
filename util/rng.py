"""The random streams of a process: Python's, NumPy's, PyTorch's, and the current GPU's (CUDA or MPS)."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_all(*key: int) -> None:
    """Seed the streams of the CPU from a key of one or more numbers."""
    seeds = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])


def get_rng_state() -> dict:
    """Return the state of every stream, CUDA's only if it is in use, MPS's where there is one, as plain types."""
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "numpy": [name, keys.tolist(), *rest], "python": random.getstate()}
    if torch.cuda.is_initialized():  # available, but unused: asking would take memory there
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    """Put the streams back to where get_rng_state() found them; a GPU's only if it is in `state` and there."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(tuple(state["numpy"]))
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def preserve_rng(enabled: bool = True) -> Iterator[None]:
    """Put the CPU's streams back, at the context's end, to where they were at its start; do nothing if disabled."""
    if not enabled:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
