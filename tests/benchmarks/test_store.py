"""Result files: what comes back, and what a strict JSON reader thinks of them."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest

from benchmarks.runner import Point, Run
from benchmarks.store import decode, encode, load, thinned
from benchmarks.suite import CaseResult


def example() -> CaseResult:
    run = Run("case", "hybrid", 0, 1.0, 500, 1e-3)
    run.final_loss, run.cost, run.done = 1.23456789, 499.0, 500
    run.points = [Point(i, i / 3, i / 7, i / 5, 1.0 / (i + 1)) for i in range(501)]
    run.statistics = {"real_steps": 7, "kernels": "torch"}
    run.calibration = {"loss": [3, 1]}
    other = Run("case", "ema", 1, 0.25, 500, 1e-3, failure="broke")
    return CaseResult("case", "controls", "target", 1.0, runs=[run, other])


def test_results_come_back_rounded_and_thinned():
    meta, (result,) = decode(encode({"commit": "abc"}, [example()]))
    assert meta == {"commit": "abc"}
    run, other = result.runs
    assert run.final_loss == 1.23457
    assert math.isnan(run.objective)
    assert run.statistics == example().runs[0].statistics
    assert run.calibration == {"loss": [3, 1]}
    assert len(run.points) <= 26
    assert (run.points[0].step, run.points[-1].step) == (0, 500)
    assert (other.failure, other.points, other.reached) == ("broke", [], None)


def test_file_is_strict_json():
    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(encode({"x": math.nan}, [example()]), parse_constant=refuse)


def test_encoding_twice_changes_nothing():
    once = encode({}, [example()])
    assert encode(*decode(once)) == once


def test_thinned_points_spread_over_the_run():
    points = [Point(i, 0.0, 0.0, 0.0, 0.0) for i in range(4001)]
    steps = [p.step for p in thinned(points, 12)]
    assert 8 <= len(steps) <= 13
    assert max(b / a for a, b in pairwise(steps[1:])) < 4


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "other.json").write_text('{"cases": [{}]}')
    with pytest.raises(ValueError, match=r"other\.json"):
        load(tmp_path / "other.json")
