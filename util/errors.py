"""Mistakes of the user: one clear message and exit code 2, never a traceback."""

import sys
from collections.abc import Callable

import torch.distributed

from util import dist


class UserError(Exception):
    """Something that the user can put right: the message says what is wrong, where, and what to do."""


def run(main: Callable[[], object]) -> None:
    """Run a script's main(); a UserError ends in its message on stderr (once per machine) and exit code 2."""
    try:
        main()
    except UserError as error:
        if dist.local_rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"rank {dist.rank()} stops: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
