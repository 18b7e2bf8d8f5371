"""`jllama plot`: one picture of one or several runs."""

import json

import matplotlib.image
import pytest

from jllama import cli
from jllama.commands import plot


@pytest.fixture
def run(tmp_path):
    """Writes the metrics of a run of ten steps."""

    def write(name, evals=True):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = [
            {"step": i, "loss": 5 - i / 3, "learning_rate": 1e-3 * i, "tokens_per_second": 900 + i}
            for i in range(1, 11)
        ]
        lines += [{"step": 10, "eval_loss": 2.0, "eval_bits_per_byte": 1.0}] if evals else []
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return str(folder)

    return write


@pytest.fixture
def drawn(monkeypatch):
    """The panels of the pictures drawn."""
    panels, subplots = [], plot.Figure.subplots

    def remember(figure, *args):
        axes = subplots(figure, *args)
        panels.extend(axes)
        return axes

    monkeypatch.setattr(plot.Figure, "subplots", remember)
    return panels


def labels(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_several_runs_in_one_png(run, drawn, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert cli.main(["plot", run("a"), run("b", evals=False), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    picture = matplotlib.image.imread(out)
    assert picture.shape[0] > 300
    assert picture.std() > 0.01
    loss, rate, speed = drawn
    assert labels(loss) == ["a", "a, held out", "b"]
    for axis, last in ((rate, 0.01), (speed, 910)):
        assert [line.get_ydata()[-1] for line in axis.get_lines()] == pytest.approx([last] * 2)


def test_the_loss_is_drawn_as_it_is_without_smoothing(run, drawn, tmp_path):
    args = [run("a", evals=False), "--out", str(tmp_path / "out.png"), "--smooth", "0"]
    assert cli.main(["plot", *args]) == 0
    for line in drawn[0].get_lines()[:2]:
        assert line.get_ydata() == pytest.approx([5 - i / 3 for i in range(1, 11)])


def test_runs_of_one_name_are_told_apart(run, drawn, tmp_path):
    runs = [run("x/tiny", evals=False), run("y/tiny", evals=False)]
    assert cli.main(["plot", *runs, "--out", str(tmp_path / "out.png")]) == 0
    assert labels(drawn[0]) == runs


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["absent"], "metrics.jsonl: missing or empty"),
        (["a", "--smooth", "1"], "--smooth=1.0"),
        (["a", "--out", "absent/out.png"], "absent/out.png: No such file"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(run, args, said, capsys, tmp_path, monkeypatch):
    run("a")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot", *args]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
