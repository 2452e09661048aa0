"""Command lines: --help shows defaults, and a mistake ends in one message, with the flag that was probably meant."""

import argparse
import difflib
from typing import NoReturn

from util.errors import UserError

UNKNOWN = "unrecognized arguments: "  # how argparse's message begins


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Format --help with the default of each flag, unless that is None, False or empty."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_none = action.default is None or action.default is False or action.default in ("", [])
        return action.help if has_none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Parser whose errors are UserErrors, instead of the list of all flags and an exit."""

    def __init__(self, description: str | None = None, **more: object) -> None:
        super().__init__(description=description, formatter_class=HelpFormatter, **more)

    def error(self, message: str) -> NoReturn:
        """Raise the UserError of a mistake in the command line.

        Args:
            message: What argparse says about it.
        """
        hints = ""
        if message.startswith(UNKNOWN):
            words = message.removeprefix(UNKNOWN).split()
            flags = [word.partition("=")[0] for word in words if word.startswith("-")]
            message = f"unknown flag {', '.join(flags)}" if flags else f"unknown argument {' '.join(words)}"
            known = self._option_string_actions
            close = [meant for flag in flags for meant in difflib.get_close_matches(flag, known, n=1)]
            hints = f": did you mean {', '.join(close)}?" if close else ""
        raise UserError(f"{message}{hints or '.'} --help lists all flags")
