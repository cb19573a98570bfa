import copy
import gc
import json
import math
import pickle

import pytest

from hybridopt.errors import HybridError, RecoveryAction
from hybridopt.telemetry import MetricsSink, read_metrics
from tests.telemetry.builders import hybrid_records, predicted, record


def same(left, right):
    """Equality in which nan equals nan."""
    return repr(left) == repr(right)


def test_metrics_round_trip_keeps_every_field(tmp_path):
    records = list(hybrid_records())
    with MetricsSink(tmp_path / "deep" / "m.jsonl") as sink:
        for one in records:
            sink.write(one)
    assert same(read_metrics(tmp_path / "deep" / "m.jsonl"), records)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_metrics_write_values_that_are_not_finite_as_null(tmp_path, value):
    path = tmp_path / "m.jsonl"
    with MetricsSink(path) as sink:
        sink.write(record(0, loss=value))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line["loss"] is None
    assert math.isnan(read_metrics(path)[0].loss)


def test_metrics_are_buffered_until_the_interval_is_full(tmp_path):
    path = tmp_path / "m.jsonl"
    sink = MetricsSink(path, flush_interval=3)
    for step in range(2):
        sink.write(record(step))
    assert not path.exists()
    sink.write(record(2))
    assert len(read_metrics(path)) == 3
    sink.write(record(3))
    assert len(read_metrics(path)) == 3
    sink.close()
    assert len(read_metrics(path)) == 4
    sink.close()
    assert len(read_metrics(path)) == 4


def test_metrics_keep_records_in_memory_only_when_asked():
    kept, dropped = MetricsSink(keep=True), MetricsSink()
    for sink in (kept, dropped):
        sink.write(record(0))
    assert kept.records == [record(0)]
    assert dropped.records == []
    assert kept.active
    assert not dropped.active


def test_metrics_of_a_new_run_replace_the_file_and_of_a_resumed_run_continue_it(
    tmp_path,
):
    path = tmp_path / "m.jsonl"
    for first, losses in ((0, (9.0, 9.0, 9.0)), (0, (1.0, 1.0, 1.0)), (2, (2.0, 2.0))):
        with MetricsSink(path) as sink:
            for offset, loss in enumerate(losses):
                sink.write(record(first + offset, loss=loss))
    read = read_metrics(path)
    assert [r.step for r in read] == [0, 1, 2, 3]
    assert [r.loss for r in read] == [1.0, 1.0, 2.0, 2.0]


def test_metrics_left_pending_are_written_when_the_sink_is_collected(tmp_path):
    path = tmp_path / "m.jsonl"
    sink = MetricsSink(path)
    sink.write(predicted(0))
    del sink
    gc.collect()
    assert len(read_metrics(path)) == 1


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_metrics_sink_copies_do_not_write_pending_lines_twice(tmp_path, clone):
    path = tmp_path / "m.jsonl"
    sink = MetricsSink(path)
    sink.write(record(0))
    other = clone(sink)
    sink.close()
    other.close()
    assert len(path.read_text().splitlines()) == 1


def test_metrics_reader_names_the_broken_line(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsSink(path) as sink:
        sink.write(record(0))
    good = path.read_text()
    path.write_text(good + '{"step": 1}\n' + good)
    with pytest.raises(HybridError, match="line 2") as caught:
        read_metrics(path)
    assert caught.value.recovery is RecoveryAction.FIX_CONFIGURATION


def test_metrics_reader_drops_a_torn_last_line(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsSink(path) as sink:
        sink.write(record(0))
        sink.write(record(1))
    path.write_bytes(path.read_bytes()[:-20])
    assert [r.step for r in read_metrics(path)] == [0]
