"""The weights of a Vision Transformer inside the checkpoints of other programs.

Training programs store weights under a key of their own (state_dict, model, teacher, ...), and the modules around the
encoder (DDP, a Lightning module, a self-supervised method) put their names before those of the weights. One rule undoes
all of it: search for the weights of a patch embedding; the dictionary that holds them, and the part of their name that
comes before, tell the rest.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

# The weights of the patch embedding, in the names of timm, mmpretrain and Hugging Face, after any prefix.
PATCH_EMBEDDING = re.compile(
    r"(.*?)(patch_embed\.proj|patch_embed\.projection|(vit\.)?embeddings\.patch_embeddings\.projection)\.weight"
)
# Modules that torch.compile, FSDP, activation checkpointing and Lightning put around others, at any depth.
TRANSPARENT = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
# The usual keys of the weights, the preferred ones first.
KEYS = ("model", "state_dict", "model_state_dict", "model_state", "net", "network", "module", "teacher", "student")
# Keys and prefixes of running averages; and of a method's networks that are not the one to take.
AVERAGES = re.compile(r"(^|[._])(ema|avg|averaged?|swa|polyak)([._]|$)", re.IGNORECASE)
SECONDARY = re.compile(r"(^|[._])(momentum|student|target|key|k)([._]|$)", re.IGNORECASE)
DEPTH = 6  # of the dictionaries that are searched


class Place(NamedTuple):
    """Place of a Vision Transformer in a checkpoint.

    Attributes:
        keys: Keys of the nested dictionaries that lead to its state dict.
        prefix: What comes before the names of its weights, without transparent modules.
        written_prefix: The same as it is written.
    """

    keys: tuple[str, ...]
    prefix: str
    written_prefix: str

    def __str__(self) -> str:
        return "/".join(filter(None, [*self.keys, self.prefix]))


class Unwrapped(NamedTuple):
    """Weights that were taken out of a checkpoint.

    Attributes:
        state: The weights under their own names, without prefix.
        steps: Where in the file they were, as a phrase for a notice; "": where this project's checkpoints have them.
        outside: Names of the weights beside the Vision Transformer, without its prefix, which are not taken.
        prefix: What the names of the weights had in front, as it stands in the file.
    """

    state: dict[str, Tensor]
    steps: str
    outside: list[str]
    prefix: str


def unwrap(content: object, ema: bool = False) -> Unwrapped | None:
    """Take a Vision Transformer's weights out of a checkpoint's content, wherever they are.

    Args:
        content: What the file holds.
        ema: Take a running average of the weights, and nothing else.

    Returns:
        The weights; a running average also where there is nothing else. None if there is no Vision Transformer, or with
        `ema` no running average.
    """
    places = list(_search(content))
    averages = [place for place in places if AVERAGES.search(f"{'.'.join(place.keys)}.{place.prefix}")]
    candidates = averages if ema else [place for place in places if place not in averages] or averages
    if not candidates:
        return None
    place = min(candidates, key=_rank)
    state = content
    for key in place.keys:
        state = state[key]

    # The Vision Transformer's names have the prefix, the others belong to something beside it.
    tensors = {
        TRANSPARENT.sub("", name): value
        for name, value in state.items()
        if isinstance(value, Tensor) and isinstance(name, str)
    }
    inside = {
        name.removeprefix(place.prefix): value for name, value in tensors.items() if name.startswith(place.prefix)
    }
    outside = [name for name in tensors if not name.startswith(place.prefix)]
    steps = _describe_steps(place, places, wrapped_inside=any(TRANSPARENT.search(str(name)) for name in state))
    return Unwrapped(inside, steps, outside, place.written_prefix)


def _search(content: object, keys: tuple[str, ...] = ()) -> Iterator[Place]:
    """Yield the place of each patch embedding in nested dictionaries."""
    if not isinstance(content, dict) or len(keys) > DEPTH:
        return
    for name, value in content.items():
        if isinstance(value, dict) and isinstance(name, str):
            yield from _search(value, (*keys, name))
        elif isinstance(value, Tensor) and (match := PATCH_EMBEDDING.fullmatch(str(name))):
            yield Place(keys, TRANSPARENT.sub("", match[1]), match[1])


def _rank(place: Place) -> tuple:
    """Return a sort key for places, smallest for the one to take."""
    key = place.keys[0] if place.keys else ""
    known = KEYS.index(key) if key in KEYS else len(KEYS)
    is_secondary = bool(SECONDARY.search(f"{'.'.join(place.keys)}.{place.prefix}"))
    return is_secondary, known if key else -1, len(place.keys), len(place.prefix)


def _describe_steps(place: Place, places: list[Place], wrapped_inside: bool) -> str:
    if place.keys in ((), ("model",)) and not place.written_prefix and not wrapped_inside:
        return ""
    steps = [f"found at '{'/'.join(place.keys)}'"] if place.keys else []
    if place.written_prefix:
        steps.append(f"prefix '{place.written_prefix}' removed")
    elif wrapped_inside:
        steps.append("names of wrapping modules removed")
    others = [f"'{other}'" for other in places if other != place]
    if others:
        steps.append(f"not taken: {', '.join(others)}")
    return ", ".join(steps)
