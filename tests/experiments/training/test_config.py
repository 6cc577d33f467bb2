"""The schema: every number has a limit, and unknown keys are errors."""

import dataclasses
import math
import re
from datetime import datetime
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from experiments.errors import UserError
from experiments.training import config
from experiments.training.main import CONF


def _raw(*overrides):
    """A config as Hydra passes it: typed, with the keys that ``+key=value`` adds."""
    raw = OmegaConf.structured(config.Config)
    raw.merge_with_dotlist(["task.name=glyphs", "algorithm.name=maml"])
    OmegaConf.set_struct(raw, False)
    for key, value in overrides:
        OmegaConf.update(raw, key, value, force_add=True)
    return raw


def _numbers(node, prefix=""):
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{prefix}{f.name}.")
        elif f.type.split(" | ")[0] in ("int", "float"):
            yield f"{prefix}{f.name}"


def test_every_number_has_a_limit_that_its_default_satisfies():
    assert sorted(_numbers(config.Config())) == sorted(config.LIMITS)
    assert config.checked(_raw()) == config.Config(
        config.TaskConfig(config.TaskName.glyphs), algorithm=config.AlgorithmConfig("maml")
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in (Path(CONF) / "experiment").glob("*.yaml")))
def test_every_experiment_is_a_config(name):
    config.register(datetime(2026, 1, 1))
    with initialize_config_dir(CONF, version_base="1.3"):
        assert config.checked(compose("config", [f"experiment={name}"])).task.name in config.TaskName


@pytest.mark.parametrize("key", config.LIMITS)
def test_a_number_that_is_not_allowed_is_named(key):
    allowed, text = config.LIMITS[key]
    value = next(x for x in (0, 1, -1) if not allowed(x))
    with pytest.raises(UserError, match=rf"^{re.escape(f'{key} must be {text}; got {value}')}(\.0)?$"):
        config.checked(_raw((key, value)))


@pytest.mark.parametrize(
    ("limit", "good", "bad"),
    [
        (config.ONE, [1, 7], [0, -1]),
        (config.TWO, [2], [1]),
        (config.ZERO, [0], [-1]),
        (config.SEED, [0, 2**63 - 1], [-1, 2**63]),
        (config.POSITIVE, [1e-9, 3.0], [0.0, -1.0, math.nan, math.inf]),
        (config.FINITE, [0, 1.0], [-1.0, math.inf, math.nan]),
        (config.FRACTION, [0.0, 0.5, 1.0], [-0.1, 1.1, math.nan]),
        (config.PROBABILITY, [0.0, 0.99], [-0.1, 1.0, math.nan]),
        (config._or_null(config.ONE), [None, 1], [0]),
    ],
)
def test_limits(limit, good, bad):
    allowed, _ = limit
    assert all(map(allowed, good))
    assert not any(map(allowed, bad))


@pytest.mark.parametrize("key", ["foo", "train.foo"])
def test_an_added_key_is_rejected(key):
    with pytest.raises(ConfigKeyError, match="Key 'foo' not in"):
        config.checked(_raw((key, 1)))
