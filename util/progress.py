"""The bar on a terminal, tqdm's; nowhere else."""

import sys

from tqdm import tqdm

from util import dist


def bar(steps: int, first_step: int, header: str) -> tqdm | None:
    """An epoch's bar; None where the output is no terminal, and on all ranks but 0."""
    if dist.rank() or not sys.stdout.isatty():
        return None
    return tqdm(
        total=steps, initial=first_step, desc=header, file=sys.stdout, dynamic_ncols=True, leave=True,
        bar_format="{desc} {n_fmt}/{total_fmt} {bar:4}{postfix}",
    )  # fmt: skip
