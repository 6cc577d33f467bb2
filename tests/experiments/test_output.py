"""Results as JSON."""

import json
import math

from experiments.output import write_json


def test_json_has_no_numbers_that_are_not_finite(tmp_path):
    write_json(tmp_path / "a.json", {"at": [1.0, math.inf, math.nan], "of": {"chance": None}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"at": [1.0, None, None], "of": {"chance": None}}
