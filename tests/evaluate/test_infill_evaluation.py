"""Single-line infilling as an evaluation: which lines, which context, which score."""

import gzip
import json
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

import jllama
from jllama import cli
from jllama.config import TrainedTokenizer
from jllama.data.source import Document
from jllama.errors import UserError
from jllama.evaluate.infill import (
    Problem,
    evaluate,
    lines,
    open_problems,
    pick_problems,
    within,
)
from jllama.generate.llama import Llama
from jllama.store.write import write_model
from jllama.text.infill import Infill, prompt_ids
from jllama.text.vocabulary import train_sentencepiece

CODE = "def f(x):\n\n    y = x + 1  \n    )\n    return y"
TEXT = Path(__file__).read_text()


@pytest.fixture(scope="module")
def model():
    config = TrainedTokenizer(kind="train", vocab_size=400, infill=True)
    tokenizer = train_sentencepiece([TEXT], config)
    shape = tiny.config(vocab_size=400, num_layers=1, max_length=128)
    return Llama(shape, tiny.params(shape), tokenizer, tiny.compute())


def test_every_line_with_a_word_in_it_is_a_problem():
    found = list(lines([Document(CODE, "a.py")]))
    assert found == [
        Problem("", "def f(x):", CODE[9:], "a.py:1"),
        Problem("def f(x):\n\n    ", "y = x + 1", "  \n    )\n    return y", "a.py:3"),
        Problem(CODE[:-8], "return y", "", "a.py:5"),
    ]
    assert all(p.prefix + p.middle + p.suffix == CODE for p in found)


def test_the_same_lines_are_chosen_on_every_machine():
    problems = list(lines([Document(TEXT, "t.py")]))
    some = pick_problems(problems, 20)
    assert some == pick_problems(reversed(problems), 20) == pick_problems(problems, 30)[:20]
    assert len({p.where for p in some}) == 20
    assert [p.where for p in pick_problems(lines([Document(CODE, "a.py")]), 2)] == [
        "a.py:3",
        "a.py:1",
    ]


@pytest.mark.parametrize("room", [16, 40, 10_000])
def test_the_context_is_whole_lines_and_what_the_room_holds(model, room):
    tokenizer = model.tokenizer
    for problem in pick_problems(lines([Document(TEXT, "t.py")]), 30):
        near = within(tokenizer, problem, room)
        assert problem.prefix.endswith(near.prefix) and problem.suffix.startswith(near.suffix)
        assert (
            near.prefix in ("", problem.prefix) or problem.prefix[: -len(near.prefix)][-1] == "\n"
        )
        assert near.suffix == problem.suffix or near.suffix[-1:] in ("", "\n")
        # BOS, PRE, SUF and MID come to it.
        assert len(prompt_ids(tokenizer, Infill(near.prefix, near.suffix))) <= room + 4
        if room == 10_000:
            assert near == problem


def slow_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    last = slow_distance(a[:-1], b[:-1]) + (a[-1] != b[-1])
    return min(last, slow_distance(a[:-1], b) + 1, slow_distance(a, b[:-1]) + 1)


@given(st.text("ab", max_size=5), st.text("abc", max_size=5))
def test_similarity_is_by_levenshtein(a, b):
    longest = max(len(a), len(b))
    wanted = 1 - slow_distance(a, b) / longest if longest else 1
    assert Levenshtein.normalized_similarity(a, b) == pytest.approx(wanted)


def test_scores_of_answers_that_are_known(model, monkeypatch):
    problems = pick_problems(lines([Document(CODE * 2, "a.py")]), 4)
    given = []

    def generate(self, prompts, **settings):
        given.extend(prompts)
        assert settings["temperature"] == 0
        return [f" {p.middle} \nx" if i % 2 else p.middle for i, p in enumerate(problems)]

    monkeypatch.setattr(Llama, "generate", generate)
    sizes = {"length": 100, "max_new_tokens": 20}
    score = evaluate(model, problems, "prefix", **sizes)
    assert (score.exact, score.similarity) == (1, 1)  # up to the end of the line
    assert all(isinstance(p, str) for p in given)
    score = evaluate(model, problems, "spm", **sizes)
    assert score.exact == 0.5 and 0.5 < score.similarity < 1  # a middle of two lines is wrong
    assert {p.format for p in given[4:]} == {"spm"}
    assert evaluate(model, [Problem("a\nb\n", "b", "\nc", "")], "line", **sizes).answers == ("a",)
    assert evaluate(model, [Problem("a\nb\n", "b", "\nb", "")], "line", **sizes).exact == 1


def test_text_without_a_line_to_fill_in_is_said(tmp_path):
    (tmp_path / "a.py").write_text(")\n")
    with pytest.raises(UserError, match=r"a\.py: has no line to fill in; give files of text$"):
        open_problems(str(tmp_path / "a.py"), 9)
    (tmp_path / "a.py").write_text(CODE)
    assert open_problems(str(tmp_path / "a.py"), 9)


def test_a_span_is_a_part_of_the_line_and_cut_to_size_without_its_suffix(
    model, tmp_path, monkeypatch
):
    (tmp_path / "a.py").write_text(CODE)
    data = str(tmp_path / "*.py")
    whole, spans = open_problems(data, 9), open_problems(data, 9, spans=True)
    assert spans == open_problems(data, 9, spans=True)
    for line, span in zip(whole, spans, strict=True):
        assert span.middle and span.middle in line.middle and span.where == line.where
        assert span.prefix.startswith(line.prefix) and span.suffix.endswith(line.suffix)
        assert span.prefix + span.middle + span.suffix == CODE
    assert any(span.middle != line.middle for line, span in zip(whole, spans, strict=True))
    answers = [p.middle + "more" for p in spans]
    monkeypatch.setattr(Llama, "generate", lambda self, prompts, **settings: answers)
    sizes = {"length": 100, "max_new_tokens": 20, "spans": True}
    assert evaluate(model, spans, "prefix", **sizes).exact == 1
    assert evaluate(model, spans, "psm", **sizes).exact == 0


def test_human_evals_lines_are_read(tmp_path):
    path = tmp_path / "lines.jsonl.gz"
    record = {"prompt": "def f():\n", "canonical_solution": "    return 1\n", "suffix": "\nx\n"}
    path.write_bytes(gzip.compress(json.dumps(record).encode()))
    found = open_problems(str(path), 10)
    assert found == [Problem("def f():\n    ", "return 1", "\n\nx\n", f"{path}:1")]
    for wrong, said in (
        ({"prompt": "a"}, "not a problem with .*KeyError: 'canonical_solution'"),
        (record | {"canonical_solution": " \n"}, "not a problem with .*is empty"),
    ):
        path.write_bytes(gzip.compress(json.dumps(wrong).encode() + b"\n"))
        with pytest.raises(UserError, match=f"gz:1: {said}"):
            open_problems(str(path), 10, spans=True)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--ways=psm,pms"], "--ways: 'pms' is unknown; choose from psm, spm, prefix, line"),
        (["--count=0"], "--count and --batch-size: must be at least 1"),
        (["--length=0"], "length=0, max_new_tokens=48: must leave room"),
        (["--length=40"], "length=40, max_new_tokens=48: must leave room"),
        (["--length=1000"], "within the model's max_length=128"),
        (["--data=nowhere.py"], "nowhere.py: no file matches"),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, monkeypatch, capsys, args, said):
    (tmp_path / "a.py").write_text(CODE)
    monkeypatch.setattr(jllama, "load", lambda path, **options: model, raising=False)
    command = ["evaluate", "infill", "--model=x", f"--data={tmp_path / '*.py'}", *args]
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err.splitlines()[-1]


def test_a_model_without_a_tokenizer_is_given_one(model, tmp_path, capsys):
    (tmp_path / "a.py").write_text(CODE)
    write_model(tmp_path / "bare", model.config, model.params, None)
    command = ["evaluate", "infill", f"--model={tmp_path / 'bare'}", "--ways=line", "--json"]
    command += [f"--data={tmp_path / '*.py'}"]
    assert cli.main(command) == 2
    assert "has no tokenizer; give one: --tokenizer PATH" in capsys.readouterr().err
    model.tokenizer.save(tmp_path / "own")
    assert cli.main([*command, f"--tokenizer={tmp_path / 'own'}"]) == 0


def test_the_command_prints_a_table_and_writes_every_answer(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.py").write_text(CODE)
    monkeypatch.setattr(jllama, "load", lambda path, **options: model, raising=False)
    out = tmp_path / "answers.jsonl"
    command = [
        "evaluate",
        "infill",
        "--model=x",
        f"--data={tmp_path / '*.py'}",
        "--max-new-tokens=4",
    ]
    assert cli.main([*command, f"--out={out}"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert "3 lines" in table[0]
    assert [line.split(":")[0] for line in table[1:]] == ["psm", "spm", "prefix", "line"]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["middle"] for r in records} == {"def f(x):", "y = x + 1", "return y"}
    assert all(r.keys() == {"where", "middle", "psm", "spm", "prefix", "line"} for r in records)
    assert cli.main([*command, f"--out={out}"]) == 2  # nothing is overwritten
    capsys.readouterr()
    assert cli.main([*command, "--json", "--ways=line"]) == 0
    assert json.loads(capsys.readouterr().out)["line"]["exact"] == 0
