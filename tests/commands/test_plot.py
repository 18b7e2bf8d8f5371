"""`jllama plot`: one picture of one or several runs."""

import json

import matplotlib.image
import pytest
import recipes

from jllama import cli
from jllama.commands import plot
from jllama.config import recipe


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
    return [text.get_text() for text in axis.figure.legends[0].get_texts()]


def colors(axis):
    return [line.get_color() for line in axis.get_lines()]


def test_several_runs_in_one_png(run, drawn, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert cli.main(["plot", run("a"), run("b", evals=False), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    picture = matplotlib.image.imread(out)
    assert picture.shape[0] > 300
    assert picture.std() > 0.01
    loss, rate, speed = drawn
    assert [label.split(":")[0] for label in labels(loss)] == ["a", "a, held out", "b"]
    assert labels(loss)[1] == "a, held out: 2.000", "the final value"
    bottom = min(axis.get_tightbbox().y0 for axis in drawn)
    assert loss.figure.legends[0].get_window_extent().y1 <= bottom, "it covers no curve"
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
    assert [label.rpartition(":")[0] for label in labels(drawn[0])] == runs


def test_runs_are_coloured_by_a_key_of_their_recipes(run, drawn, tmp_path, capsys):
    runs = [run(name, evals=False) for name in ("a", "b", "_$c")]
    for folder, peak in zip(runs, (1e-2, 1e-3, 1e-2), strict=True):
        config = recipes.in_memory(f"training.schedule.peak={peak}")
        (tmp_path / folder / "config.yaml").write_text(recipe.to_yaml(config))
    args = [*runs, "--out", str(tmp_path / "out.png"), "--group"]
    assert cli.main(["plot", *args, "training.schedule.peak"]) == 0
    names = [label.rpartition(":")[0] for label in labels(drawn[0])]
    key = "training.schedule.peak"
    assert names == [f"b ({key} 0.001)", f"a ({key} 0.01)", f"_$c ({key} 0.01)"]
    assert colors(drawn[1]) == ["C0", "C1", "C1"]
    assert cli.main(["plot", *args, "training.lr"]) == 2
    err = capsys.readouterr().err
    assert "--group training.lr: no run's recipe has this key; give one such as" in err
    assert cli.main(["plot", *args, err.split()[-1]]) == 0


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
