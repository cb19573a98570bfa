import re

import pytest

from hybridopt.telemetry.narrative import (
    describe,
    format_table,
    seed_rows,
    summary_rows,
)
from tests.telemetry.builders import comparison


def cells(runs):
    return {row.label: row.cells for row in summary_rows(runs)}


def test_summary_shows_measured_numbers_of_every_run():
    table = cells(comparison())
    assert table[""] == ("bare", "hybrid", "shortened")
    assert table["held-out loss at the end (nats/byte)"] == (
        "2.0000",
        "1.9000",
        "2.4000",
    )
    assert table["backward calls"] == ("30", "15", "15")
    assert table["training sequences used (real samples)"] == ("240", "120", "120")
    assert table["predicted steps"] == ("-", "18", "-")
    assert table["rolled-back steps"] == ("-", "1", "-")
    assert table["optimizer memory beyond the weights"][0] == "3.0 MiB"


def test_summary_says_not_reached_instead_of_extrapolating():
    table = cells(comparison())
    assert table["cost to reach loss 2.0000 (real steps)"] == (
        "30.0",
        "10.0",
        "not reached",
    )
    assert table["wall time to reach loss 2.0000 (s)"][2] == "not reached"


def test_summary_leaves_equal_loss_out_when_there_is_none():
    assert not any("reach" in label for label in cells(comparison((3.0, 3.1))))


def test_description_says_that_prediction_paid_when_it_did():
    first, *rest = describe([comparison()])
    assert first.startswith("Prediction paid: 3.00x less cost at equal loss")
    assert "spent 30.0 real steps and the hybrid 10.0" in first
    text = " ".join(rest)
    assert "the bare run never got that low" in text
    assert "18 were predicted" in text
    assert "does not explain the result" in text
    assert "one seed, and the two final losses differ by 5.0%" in text
    assert "may well change the verdict" not in text


def test_description_says_plainly_when_prediction_did_not_pay():
    first, *rest = describe([comparison((3.0, 2.8, 2.6, 2.5), 10)])
    assert first.startswith("Prediction did not pay")
    assert "3.00x as much" in first
    assert "cheaper" in first
    text = " ".join(rest)
    assert "In wall time the hybrid run was slower" in text
    assert "ended at a higher held-out loss: 2.5000 against 2.0000" in text
    assert "would have done at least as well" in text
    assert "paid:" not in text


def test_description_claims_nothing_within_the_noise():
    first, *_, last = describe([comparison((3.0, 2.5, 2.2, 1.99), 10)])
    assert first.startswith("Prediction made no difference")
    assert "differ by 0.5%. Another seed may well change the verdict" in last


def test_description_without_a_common_loss_gives_no_speedup():
    text = " ".join(describe([comparison((3.0, 3.1, 3.2))]))
    assert "cannot be compared" in text
    assert not re.search(r"\d+\.\d+x", text)


def test_seed_table_has_mean_and_deviation_of_the_speedups():
    runs = [comparison(seed=4), comparison(hybrid_cost=10.0, seed=5)]
    table = {row.label: row.cells for row in seed_rows(runs)}
    assert table["4"][2] == "3.0000"
    assert table["5"][2] == "1.5000"
    assert float(table["mean"][2]) == pytest.approx(2.25)
    assert float(table["standard deviation"][2]) == pytest.approx(1.0607, abs=1e-4)
    assert describe(runs)[0].startswith("Prediction paid: 2.25x")


def test_table_columns_are_aligned():
    lines = format_table(summary_rows(comparison()))
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["bare", "hybrid", "shortened"]


def test_bookkeeping_is_also_given_in_units_of_a_bare_step():
    runs = comparison()
    values = cells(runs)["bookkeeping per scheduled step (share of a bare step)"]
    own = runs.hybrid.bookkeeping_share * runs.hybrid.wall_s
    own /= runs.hybrid.scheduled_steps
    bare = runs.bare.wall_s / runs.bare.scheduled_steps
    assert f"{own / bare:.1%}" in values
