"""The command ``train_maml.py``: from the command line to a run and an exit code."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser  # there is no public one
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import RunStoppedError, UserError
from . import checkpoint, choices, config, distributed, evaluate, loop
from .choices import CONF
from .config import Config, Mode, checked
from .setup import setup

# What may change when a run is resumed: nothing that its numbers depend on, but for how long it goes.
RESUMED = (
    "resume",
    "device",
    "threads",
    "backend",
    "compile",
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.validate_every",
    "train.validation_tasks",
    "test.*",
)
# And when it is evaluated: on which tasks and how, but not what was learned.
EVALUATED = (
    "mode",
    "checkpoint",
    "device",
    "threads",
    "backend",
    "seed",
    "task.shot",
    "task.queries",
    "task.augment",
    "task.root",
    "test.*",
)


def _of_checkpoint(path: Path, current: DictConfig, done: str, free: tuple[str, ...]) -> DictConfig:
    """The config of the checkpoint of a run that is ``done``, changed by the command line where it is ``free`` to."""
    stored = OmegaConf.merge(OmegaConf.structured(Config), checkpoint.load(path, config=dict)["config"])
    assert isinstance(stored, DictConfig)
    for override in HydraConfig.get().overrides.task:
        key = override.split("=", 1)[0].lstrip("+~")
        if not any(fnmatchcase(key, pattern) for pattern in free):
            raise UserError(
                f"{key} cannot change when a run is {done}, it comes from the checkpoint; these can: {', '.join(free)}"
            )
        OmegaConf.update(stored, key, OmegaConf.select(current, key))
    return stored


@contextmanager
def _no_empty_directory(out: Path) -> Iterator[None]:
    """A block that fails before it writes anything leaves no directory behind, if it is this command's own.

    That is one named by the time at which the command started: no run's that is resumed, and none of the user's.
    """
    try:
        yield
    except BaseException:
        started = OmegaConf.create({"text": "${started:}"}).text
        if started in (out.name, out.parent.name):  # the latter of a sweep
            with suppress(OSError):  # it holds files, or another process has done it
                out.rmdir()
        raise


def job(raw: DictConfig) -> None:
    """One run. It ends the process itself, so that no mistake of the user's prints a traceback of Hydra's."""
    try:
        with _no_empty_directory(Path(HydraConfig.get().runtime.output_dir)):
            run(raw)
    except UserError as error:
        if _wants_traceback():
            raise
        _exit(error.code, f"error: {error}")
    except OmegaConfBaseException as error:
        if _wants_traceback():
            raise
        _exit(2, f"error: {_one_line(error)}")
    except loop.StoppedBySignal as stop:
        out = HydraConfig.get().runtime.output_dir
        _exit(stop.code, f"stopped after a whole step, which is saved; go on with resume={out}")
    except KeyboardInterrupt:
        _exit(130, "stopped at once")
    except Exception as error:
        if distributed.size() == 1 or _wants_traceback():
            raise
        # One line of the first process to fail, not a traceback of each.
        what = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        _exit(1, f"error: rank {distributed.rank()}: {what} (METAATTN_TRACEBACK=1 shows where)")


def run(raw: DictConfig) -> None:
    """Train, resume or evaluate."""
    out = Path(HydraConfig.get().runtime.output_dir)
    if raw.mode is Mode.evaluate:
        if raw.checkpoint is None:
            raise UserError("mode=evaluate needs checkpoint=PATH, a checkpoint or the directory of a run")
        path = checkpoint.find(raw.checkpoint, "best.pt")
        c = checked(_of_checkpoint(path, raw, "evaluated", EVALUATED))
        summary = evaluate.run_evaluation(setup(c), path, out)
    else:
        if raw.checkpoint is not None:
            raise UserError(
                f"checkpoint={raw.checkpoint} is for mode=evaluate; to train on from it give resume={raw.checkpoint}"
            )
        resume = checkpoint.find(raw.resume) if raw.resume else None
        c = checked(_of_checkpoint(resume, raw, "resumed", RESUMED) if resume else raw)
        ready = setup(c)
        try:
            summary = loop.train(ready, out, resume)
        except distributed.LostProcessError as lost:
            raise RunStoppedError(f"{lost}; go on from the last checkpoint with resume={out}") from lost
    if distributed.is_first():
        print(evaluate.table(summary, out))


def _one_line(error: Exception) -> str:
    """A mistake on the command line in one line, with the nearest name that there is."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < 2:
        text = str(cause).strip().splitlines()
        if text and text[0] not in parts:
            parts.append(text[0].rstrip("."))
        cause = cause.__cause__
    message = "; ".join(parts)
    if isinstance(error, OverrideParseException) and "=" not in error.override:
        return f"{message}; expected key=value"
    groups = choices.groups()
    if (lost := re.search(r"Could not find '(\w+)/([^']*)'", message)) and lost[1] in groups:
        options = groups[lost[1]]
        near = get_close_matches(lost[2], options, 1)
        return f"{message}{f' (did you mean {near[0]!r}?)' if near else ''}; there are {', '.join(options)}"
    names = _names()
    for word in re.findall(r"[\w-]+", " ".join(re.findall(r"'([^']*)'", message))):
        if word not in names and not word.lower().endswith("config") and (near := get_close_matches(word, names, 1)):
            return f"{message} (did you mean {near[0]!r}?)"
    return message


def _names() -> list[str]:
    """All keys, groups and options."""
    names: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            names.update(map(str, node))
            for child in node.values():
                walk(child)

    walk(OmegaConf.to_container(OmegaConf.structured(Config), throw_on_missing=False))
    for group, options in choices.groups().items():
        names.update([group, *options])
    return sorted(names)


def _check_flags() -> None:
    """Tell in one line, without Hydra's usage, what is none of its flags."""
    parser = get_args_parser()

    def error(message: str) -> NoReturn:
        _exit(2, f"error: {message}; settings are key=value, without dashes: see --help")

    parser.error = error  # type: ignore[method-assign]
    parser.parse_args()


def _exit(code: int, message: str) -> NoReturn:
    if distributed.speaks():
        below_bar = "" if distributed.is_first() else "\n"  # the first rank's, which it has not closed
        print(f"{below_bar}{message}", file=sys.stderr)
    sys.exit(code)


def _wants_traceback() -> bool:
    return os.environ.get("METAATTN_TRACEBACK") == "1"


def main() -> None:
    """Run the command line; exits 0, 1 (the run cannot go on), 2 (a mistake of the user's), 130 (Ctrl-C)."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, and not to Hydra's own printing
    with distributed.processes():
        config.register(distributed.of_first(datetime.now()))
        choices.register()
        _check_flags()
        try:
            hydra.main(version_base="1.3", config_path=CONF, config_name="config")(job)()
        except (HydraException, OmegaConfBaseException) as error:
            if _wants_traceback():
                raise
            _exit(2, f"error: {_one_line(error)}")
