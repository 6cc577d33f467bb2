"""From the command line to a command and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import bench, doctor


class _Parser(argparse.ArgumentParser):
    """Mistakes are told in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Those of the command line; of this process by default.

    Returns:
        The exit code: 0; 1 if a result is wrong here; 130 after Ctrl-C.

    Raises:
        SystemExit: With code 2 for a mistake in the arguments, told in one line before any work; 0 after ``--help``.
    """
    p = _Parser(prog="metaattn", description="Attention that can be differentiated to any order.")
    commands = p.add_subparsers(dest="command", required=True, metavar="doctor|bench")
    for module in (doctor, bench):
        assert module.__doc__ is not None
        title, name = module.__doc__.splitlines()[0], module.__name__.rsplit(".", 1)[-1]
        command = commands.add_parser(
            name, help=title, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = p.parse_args(arguments)
    try:
        code: int = options.run(options)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return code
