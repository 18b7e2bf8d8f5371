"""`jllama compare`: what differs between runs, and their losses."""

import json

import pytest
import recipes

from jllama import cli
from jllama.config import recipe


@pytest.fixture
def run(tmp_path):
    """Writes the recipe and the metrics of a run of ten steps."""

    def write(name, *overrides, evals=((5, 2.5), (10, 2.75))):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(recipe.to_yaml(recipes.in_memory(*overrides)))
        lines = [
            {"step": i, "loss": 5 - i / 4, "tokens_per_second": 900 + i, "weight": 7}
            for i in range(1, 11)
        ]
        lines += [{"step": i, "eval_loss": x, "eval_bits_per_byte": x / 2} for i, x in evals]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return str(folder)

    return write


def rows(out):
    """The cells of each row, by its first cell."""
    lines = [line.split("  ") for line in out.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_what_differs_and_the_losses(run, capsys):
    constant = "training.schedule={kind: constant, peak: 0.02, warmup_steps: 2}"
    a, b = run("a", "run.name=x"), run("b", "run.name=y", constant, evals=())
    assert cli.main(["compare", a, b]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["a", "b"]
    table = rows(out)
    assert table["training.schedule.kind"] == ["cosine", "constant"]
    assert table["training.schedule.peak"] == ["0.01", "0.02"]
    assert table["training.schedule.floor"] == ["0.1", "-"]
    assert not {"training.schedule.warmup_steps", "run.name", "training.steps"} & table.keys()
    assert table["steps"] == ["10", "10"]
    assert table["training loss, last"] == ["2.5000", "2.5000"]
    assert table["held-out loss, last"] == ["2.7500", "-"]
    assert table["held-out loss, best"] == ["2.5000 at 5", "-"]
    assert table["bits per byte, best"] == ["1.2500 at 5", "-"]
    assert table["tokens per second"] == ["906", "906"]


def test_a_text_of_several_lines_takes_one(run, capsys):
    texts = ("two\nlines", "")
    a, b = (run(n, f"sample.prompt={json.dumps(x)}") for n, x in zip("ab", texts, strict=True))
    assert cli.main(["compare", a, b]) == 0
    assert rows(capsys.readouterr().out)["sample.prompt"] == [json.dumps(x) for x in texts]


def test_json_has_exact_figures_and_items_of_lists(run, capsys):
    a, b = run("a"), run("b", "data.train.0.weight=3")
    assert cli.main(["compare", a, b, "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)
    assert [runs[name]["recipe"] for name in "ab"] == [
        {"data.train.0.weight": 1.0},
        {"data.train.0.weight": 3.0},
    ]
    assert runs["a"]["eval_loss"] == {"last": 2.75, "best": 2.5, "best_step": 5}
    assert runs["a"]["tokens_per_second"] == 905.5


def test_a_folder_that_is_no_run_is_one_line(run, tmp_path, capsys):
    assert cli.main(["compare", run("a"), str(tmp_path / "none")]) == 2
    err = capsys.readouterr().err
    assert "none/metrics.jsonl: missing or empty" in err and err.count("\n") == 1
