"""The report of many seeds: paired gains, corrections for many comparisons, tables and pictures of what is there."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from samples.paper.paired import Gain, gain, told_apart
from samples.paper.power import POWER
from samples.paper.runs import Row


def rows(*errors: float, method: str = "") -> list[Row]:
    return [{"seed": seed, "error": error, "method": method} for seed, error in enumerate(errors)]


def test_gains_are_paired_by_seed_and_have_the_interval_of_students_t() -> None:
    found = gain(rows(0.10, 0.11, 0.12), rows(0.11, 0.13, 0.13, 0.5))
    assert found is not None and found.seeds == 3
    assert found.mean == pytest.approx(4 / 3)
    half = 4.302653 * 0.5773503 / 3**0.5  # the quantile of t with 2 degrees of freedom, the deviation
    assert (found.low, found.high) == pytest.approx((4 / 3 - half, 4 / 3 + half), rel=1e-5)
    assert found.t == pytest.approx((4 / 3) / (0.5773503 / 3**0.5), rel=1e-5)


def test_one_seed_and_equal_differences_have_no_interval() -> None:
    assert gain(rows(0.1), rows(0.2)) is None
    assert gain(rows(0.1, 0.1), rows(0.1, 0.1)) is None


def test_holm_asks_more_of_the_first() -> None:
    def with_p(*ps: float) -> list[Gain]:
        return [Gain(1.0, 0.0, 2.0, 2.0, p, 20) for p in ps]

    assert told_apart(with_p(0.04, 0.01, 0.02)) == [True, True, True]
    assert told_apart(with_p(0.04, 0.02, 0.03)) == [False, False, False]
    assert told_apart(with_p(0.001, 0.06, 0.02)) == [True, False, True]


def test_runs_have_keys_of_their_own_and_twenty_seeds() -> None:
    for name, experiment in POWER.items():
        runs = list(experiment.runs("power"))
        assert len({run.key for run in runs}) == len(runs), name
        assert {run.seed for run in runs} == set(range(20)), name
    assert len(POWER["trees"].methods) == 31


@pytest.mark.slow
def test_every_table_and_picture_is_made_of_what_is_there(tmp_path: Path) -> None:
    from samples.paper.power_report import CLAIMS, write

    draw = random.Random(0)
    found = [
        {
            "key": run.key,
            "data": run.setting.data,
            "noise": run.noise,
            "method": run.method.name,
            "seed": run.seed,
            "error": 0.1 + 0.01 * draw.random() + 0.05 * (run.method.name == "single instance"),
            "errors of heads": [0.1, 0.2],
            "stopped": {"epoch": 3, "held out": 0.5, "error": 0.0625 * run.seed},
            "error of the ensemble": 0.1,
            "machine": "a machine",
            "torch": "2.14",
        }
        for experiment in POWER.values()
        for run in experiment.runs("power")
        if run.seed < 3
    ]
    write(found, tmp_path)
    text = (tmp_path / "power.md").read_text()
    for claim in CLAIMS:
        assert f"| {claim.sentence} |" in text
    assert "Two instances that learn from each other beat one (table 1) | digits, 1,000 | 0% | +" in text
    assert text.count("Rank correlation") == 2
    stopped = text.split("Stopped at the epoch")[1].split("\n\n")[1]
    assert "| single instance | 6.25 |" in stopped  # the mean of 0, 6.25 and 12.5
    for experiment in POWER.values():
        for method in experiment.methods:
            assert f"| {method.name} |" in text
    for theme in ("light", "dark"):
        assert (tmp_path / f"trees-digits-{theme}.svg").read_text().startswith("<?xml")


def test_a_regression_is_compared_with_one_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from samples import regression

    monkeypatch.setattr(regression, "EPOCHS", 4)
    rows = regression.main(2, tmp_path / "rows.jsonl")
    assert regression.main(2, tmp_path / "rows.jsonl") == rows, "rows aren't run again"
    assert len(rows) == 12 and all(0.5 < row["error"] < 1.5 for row in rows)
    lines = list(regression.compare(rows))
    assert len(lines) == 6 and sum(", t " in line for line in lines) == 4
