"""Metrics in metrics.jsonl, in TensorBoard and on stderr, also after a run is resumed."""

import json
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from jllama.errors import UserError
from jllama.train.metrics import MetricsWriter, read

VALUES = {
    "loss": 2.5, "grad_norm": 1.0, "learning_rate": 1e-3, "weight": 95.0, "computed_tokens": 100,
    "seconds": 1.0,
}  # fmt: skip


def scalars(folder):
    """{(tag, step): value} of TensorBoard's event files: records framed as TFRecord does it."""
    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            at += 12 + size + 4  # a checksum after the size, and one after the data
    return found


def write(folder, steps, start=0, log_every=1):
    metrics = MetricsWriter(folder, start, 10, log_every)
    for step in steps:
        metrics.write(step, VALUES | {"loss": float(step)})
    return metrics


def test_each_step_is_a_line_and_a_point_of_tensorboard(tmp_path):
    metrics = write(tmp_path, (1, 2))
    metrics.write_eval(2, {"loss": 1.5, "bits_per_byte": 0.5})
    metrics.close()
    lines = read(tmp_path / "metrics.jsonl")
    assert lines == [
        {"step": 1, **VALUES, "loss": 1.0},
        {"step": 2, **VALUES, "loss": 2.0},
        {"step": 2, "eval_loss": 1.5, "eval_bits_per_byte": 0.5},
    ]
    board = scalars(tmp_path / "tensorboard")
    assert board[("loss", 1)] == 1.0
    assert board[("eval_loss", 2)] == 1.5
    assert board[("learning_rate", 2)] == pytest.approx(1e-3)
    assert len(board) == 2 * len(VALUES) + 2


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    metrics = write(tmp_path, (1,))
    assert len(read(tmp_path / "metrics.jsonl")) == 1
    metrics.close()


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert read(path) == [{"step": 1, "loss": 3.0}]
    assert read(tmp_path / "absent") == []


def test_resuming_drops_later_steps_and_a_line_that_was_cut_off(tmp_path):
    write(tmp_path, range(1, 8)).close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 8, "lo')
    write(tmp_path, (5, 6), start=4).close()
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4, 5, 6]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_without_a_terminal_every_nth_step_is_a_line_on_stderr(tmp_path, capfd):
    write(tmp_path, range(1, 7), log_every=3).close()
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split("  ")[0] for line in err.splitlines()] == ["step 3", "step 6"]
    assert "loss 3.000" in err


def test_a_line_has_the_mean_speed_since_the_last_and_the_time_left(tmp_path, capfd):
    metrics = MetricsWriter(tmp_path, 4, 18, log_every=3)
    seconds = {5: 60.0, 6: 1.0, 7: 1.0, 8: 3.0, 9: 5.0, 10: 1.0, 11: 1.0, 12: 1.0}
    for step, taken in seconds.items():
        metrics.write(step, VALUES | {"seconds": taken})
    metrics.close()
    ends = [line.rpartition("e-03  ")[2] for line in capfd.readouterr().err.splitlines()]
    # Step 5, the first one, compiled: no mean counts it.
    assert ends == ["100 tok/s  00:12 left", "33 tok/s  00:27 left", "100 tok/s  00:06 left"]


def test_a_line_also_has_the_speed_of_predicted_tokens_where_they_are_few(tmp_path, capfd):
    metrics = MetricsWriter(tmp_path, 0, 10, log_every=2)
    for step in (1, 2):
        metrics.write(step, VALUES | {"weight": 30.0})
    metrics.close()
    assert "  100 tok/s, 30 predicted  00:08 left" in capfd.readouterr().err


def test_the_first_line_says_how_long_the_first_step_took(tmp_path, capfd):
    write(tmp_path, (1, 2)).close()
    first, second = capfd.readouterr().err.splitlines()
    assert first.endswith("  first step 1.0 s")
    assert second.endswith("  100 tok/s  00:08 left")


def test_a_full_disk_is_a_one_line_error_and_does_not_block(tmp_path):
    metrics = write(tmp_path, (1,))
    metrics._file.close()
    metrics._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    with pytest.raises(UserError, match=r"metrics.jsonl: not writable: No space left"):
        metrics.write(2, VALUES)
    with pytest.raises(UserError, match="not writable: No space left"):
        metrics.close()


def test_a_tensorboard_thread_that_ended_is_an_error_and_does_not_block(tmp_path):
    metrics = write(tmp_path, (1,))
    metrics._boarder.stop()
    with pytest.raises(UserError, match="tensorboard: not writable"):
        metrics.write(2, VALUES)
    with pytest.raises(UserError, match="tensorboard: not writable"):
        metrics.close()
