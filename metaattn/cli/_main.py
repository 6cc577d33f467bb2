"""The entry point: parse the command line, run a command, return an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import metaattn

from . import bench, doctor


class _Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The arguments; by default those of the process.

    Returns:
        The exit code: 0, 1 if a result is wrong on this machine, 130 after Ctrl-C.

    Raises:
        SystemExit: With code 2 and one line for a mistake in the arguments, before any work; with code 0 after
            ``--help`` and ``--version``.
    """
    p = _Parser(prog="metaattn", description=metaattn.__doc__)
    p.add_argument("--version", action="version", version=f"metaattn {metaattn.__version__}")
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
