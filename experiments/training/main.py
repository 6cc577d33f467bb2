"""The command ``train_maml.py``: parse the command line, run, and end with an exit code."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser  # Hydra has no public one
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import CheckpointError, RunStoppedError, UserError
from . import checkpoint, choices, config, directory, distributed, evaluate, loop, state
from .choices import CONF
from .config import Config, Mode, checked
from .interrupts import StoppedBySignal
from .setup import setup

# Keys that may change when a run is resumed: those that do not change its numbers, and its length.
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
# Keys that may change when a checkpoint is evaluated: the tasks and the execution, but not what was learned.
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


def _override(saved: dict[str, Any], current: DictConfig, use: str, free: tuple[str, ...]) -> Config:
    """Return the config of a checkpoint with the overrides of the command line.

    Args:
        saved: The config of the checkpoint.
        current: The config of the command line.
        use: ``"resumed"`` or ``"evaluated"``, for the error message.
        free: Patterns of the keys that may change.

    Raises:
        UserError: Another key was overridden, or a value is not allowed.
        CheckpointError: The checkpoint's config is not valid.
    """
    try:
        _check_saved(saved)
        stored = OmegaConf.structured(checked(OmegaConf.create(saved)))
    except (OmegaConfBaseException, UserError) as error:
        reason = _one_line(error) if isinstance(error, OmegaConfBaseException) else str(error)
        raise CheckpointError(f"its config is not valid ({reason})") from error
    assert isinstance(stored, DictConfig)
    for override in HydraConfig.get().overrides.task:
        key = override.split("=", 1)[0].lstrip("+~")
        if not any(fnmatchcase(key, pattern) for pattern in free):
            raise UserError(
                f"{key} cannot change when a run is {use}, it comes from the checkpoint; these can: {', '.join(free)}"
            )
        OmegaConf.update(stored, key, OmegaConf.select(current, key))
    return checked(stored)


def _check_saved(saved: Any, key: str = "config") -> None:
    """Check that a config has plain values: as a string, ``${...}`` could read the environment."""
    if isinstance(saved, dict):
        for name, value in saved.items():
            if not isinstance(name, str):
                raise UserError(f"a key of {key} is not a string")
            _check_saved(value, f"{key}.{name}")
    elif isinstance(saved, list):
        for value in saved:
            _check_saved(value, key)
    elif isinstance(saved, str) and "${" in saved:
        raise UserError(f"{key} is an expression")
    elif saved is not None and not isinstance(saved, (str, int, float)):
        raise UserError(f"{key} is of type {type(saved).__name__}")


def job(raw: DictConfig) -> None:
    """Run once. Errors end the process here, so that Hydra prints no traceback for a mistake of the user."""
    try:
        with directory.no_empty_directory(Path(HydraConfig.get().runtime.output_dir)), _quiet_threads():
            run(raw)
    except UserError as error:
        if _show_traceback():
            raise
        _exit(error.code, f"error: {error}")
    except OmegaConfBaseException as error:
        if _show_traceback():
            raise
        _exit(2, f"error: {_one_line(error)}")
    except StoppedBySignal as stop:
        out = HydraConfig.get().runtime.output_dir
        _exit(stop.code, f"stopped after a complete step, which is saved; continue with resume={out}")
    except KeyboardInterrupt:
        _exit(130, "stopped immediately")
    except OSError as error:
        if _show_traceback():
            raise
        _exit(1, f"error: {_os_error(error)}; what is complete stays (METAATTN_TRACEBACK=1 shows where)")
    except Exception as error:
        if distributed.size() == 1 or _show_traceback():
            raise
        # One line from the first process that fails, instead of a traceback from each.
        what = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        _exit(1, f"error: rank {distributed.rank()}: {what} (METAATTN_TRACEBACK=1 shows where)")


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Print no traceback for a full disk in TensorBoard's thread, which passes the error on to the main thread."""
    report = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, OSError):
            report(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = report


def run(raw: DictConfig) -> None:
    """Train, resume or evaluate."""
    out = Path(HydraConfig.get().runtime.output_dir)
    summary = (_evaluate if raw.mode is Mode.evaluate else _train)(raw, out)
    if distributed.is_first():
        print(evaluate.table(summary, out))


def _evaluate(raw: DictConfig, out: Path) -> dict[str, Any]:
    if raw.checkpoint is None:
        raise UserError("mode=evaluate needs checkpoint=PATH, a checkpoint or the directory of a run")
    path = checkpoint.find(raw.checkpoint, "best.pt")
    advice = "give a new directory for the results of the evaluation with hydra.run.dir=PATH"
    with directory.owned(out, ("latest.pt", "best.pt"), advice):
        content = checkpoint.load(path, config=dict, meta=dict, step=int)
        with _of_checkpoint(path):
            ready = setup(_override(content["config"], raw, "evaluated", EVALUATED), content["meta"])
            meta = state.restore_meta(ready, content["meta"])
        return evaluate.test(ready, meta, out, content["step"])


def _train(raw: DictConfig, out: Path) -> dict[str, Any]:
    if raw.checkpoint is not None:
        raise UserError(
            f"checkpoint={raw.checkpoint} is for mode=evaluate; to train it further give resume={raw.checkpoint}"
        )
    path = checkpoint.find(raw.resume) if raw.resume else None
    continues = path is not None and path.parent.resolve() == out.resolve()
    advice = f"continue that run with resume={out}, or give a new directory with hydra.run.dir=PATH"
    with directory.owned(out, () if continues else directory.OF_A_RUN, advice):
        try:
            if path is None:
                return loop.train(setup(checked(raw)), out)
            saved = checkpoint.load(path, config=dict, **state.ENTRIES)
            with _of_checkpoint(path):
                ready = setup(_override(saved["config"], raw, "resumed", RESUMED), saved["meta"])
            try:
                return loop.train(ready, out, saved)
            except CheckpointError as error:
                raise UserError(f"{path} cannot be resumed: {error}") from error
        except distributed.LostProcessError as lost:
            raise RunStoppedError(f"{lost}; continue from the last checkpoint with resume={out}") from lost


@contextmanager
def _of_checkpoint(path: Path) -> Iterator[None]:
    """Name the checkpoint in errors of the block, which builds what its config describes."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _os_error(error: OSError) -> str:
    """Describe a full disk, a file that cannot be written and the like."""
    name = f"{error.filename}: " if error.filename is not None else ""
    return f"{name}{error.strerror or error}"


def _one_line(error: Exception) -> str:
    """Describe a mistake on the command line in one line, with the nearest valid name."""
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
    if (unknown := re.search(r"Could not find '(\w+)/([^']*)'", message)) and unknown[1] in groups:
        options = groups[unknown[1]]
        near = get_close_matches(unknown[2], options, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"{message}{hint}; the choices are {', '.join(options)}"
    if invalid := re.search(r"Invalid value '([^']*)', expected one of \[(.*)\]", message):
        near = get_close_matches(invalid[1], invalid[2].split(", "), 1)
        return f"{message} (did you mean {near[0]!r}?)" if near else message
    if "not Optional" in message or "could not be converted" in message:  # the key exists
        return message
    words = sorted(choices.words())
    for word in re.findall(r"[\w-]+", " ".join(re.findall(r"'([^']*)'", message))):
        if word not in words and not word.lower().endswith("config") and (near := get_close_matches(word, words, 1)):
            return f"{message} (did you mean {near[0]!r}?)"
    return message


def _check_command_line() -> None:
    """Report an unknown flag, and a group without a choice, in one line: Hydra prints its usage, or a traceback."""
    parser = get_args_parser()

    def error(message: str) -> NoReturn:
        _exit(2, f"error: {message}; settings are key=value, without dashes: see --help")

    parser.error = error  # type: ignore[method-assign]
    for override in parser.parse_args().overrides:
        key, _, value = override.partition("=")
        if not key:
            _exit(2, f"error: expected key=value; got {override}")
        options = choices.groups().get(key, [])
        if options and any(re.fullmatch(r" *(null|[-+.\d]*) *", part) for part in value.split(",")):
            _exit(2, f"error: {key} must be one of {', '.join(options)}, or be left out; got {override}")


def _exit(code: int, message: str) -> NoReturn:
    if distributed.is_first_to_report():
        newline = "" if distributed.is_first() else "\n"  # the first rank's progress bar may still be open
        print(f"{newline}{message}", file=sys.stderr)
    sys.exit(code)


def _show_traceback() -> bool:
    return os.environ.get("METAATTN_TRACEBACK") == "1"


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: With code 1 if the run cannot continue, 2 for a mistake of the user, 130 after Ctrl-C and 143 after
            SIGTERM.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors reach this function instead of Hydra's printing
    with distributed.processes():
        config.register(distributed.from_first(datetime.now()))
        choices.register()
        _check_command_line()
        try:
            hydra.main(version_base="1.3", config_path=CONF, config_name="config")(job)()
        except (HydraException, OmegaConfBaseException) as error:
            if _show_traceback():
                raise
            _exit(2, f"error: {_one_line(error)}")
        except OSError as error:  # Hydra creates the output directory
            if _show_traceback():
                raise
            _exit(2, f"error: the output directory cannot be created: {_os_error(error)}")
