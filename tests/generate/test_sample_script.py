"""sample.py: several prompts, prompts in files, stop strings, special tokens, and its defaults."""

from pathlib import Path

import pytest
import tiny

from jllama.config import SampleConfig, TrainedTokenizer
from jllama.errors import UserError
from jllama.generate.llama import Llama
from jllama.text.infill import Infill
from jllama.text.vocabulary import train_sentencepiece

GREEDY = {"max_new_tokens": 6, "temperature": 0.0}


@pytest.fixture(scope="module")
def model():
    tokenizer = train_sentencepiece(
        [Path(__file__).read_text()],
        TrainedTokenizer(kind="train", vocab_size=400, infill=True),
    )
    config = tiny.config(vocab_size=400, num_layers=1, max_length=64)
    return Llama(config, tiny.params(config, scale=9.0, seed=1), tokenizer, tiny.compute())


def test_the_defaults_are_those_of_generate_and_of_a_recipes_sample(sample, model, capsys):
    sample("--prompt", "def f")
    assert [capsys.readouterr().out] == model.generate("def f", max_new_tokens=6)
    recipe = SampleConfig()
    settings = {key: getattr(recipe, key) for key in ("temperature", "top_k", "top_p")}
    assert model.generate("x", max_new_tokens=6, **settings) == model.generate(
        "x", max_new_tokens=6
    )


def test_several_prompts_are_answered_in_order_each_under_its_own_line(
    sample, model, capsys, tmp_path
):
    file = tmp_path / "prompt"
    file.write_text("import os\n")  # the newline is part of it
    prompts = ["def f", "import os\n", Infill("a = ", "\n")]
    args = ("--prompt", "def f", "--prompt-file", str(file), "--prompt", "a = <FILL_ME>\n")
    sample(*args, "--temperature=0")
    first, second, third = model.generate(prompts, **GREEDY)
    assert capsys.readouterr() == (
        f"--- prompt 1 of 3: 'def f'\n{first}\n"
        f"--- prompt 2 of 3: 'import os\\n'\n{second}\n"
        f"--- prompt 3 of 3: 'a = <FILL_ME>\\n'\n{third}\n",
        "",
    )
    sample(*args[:4], "--num-samples=2", "--seed=3")
    answers = model.generate(prompts[:2], num_samples=2, seed=3, max_new_tokens=6)
    lines = [
        f"--- prompt {n} of 2, sample {k} of 2: {prompts[n - 1]!r}\n"
        for n in (1, 2)
        for k in (1, 2)
    ]
    wanted = "".join(f"{line}{text}\n" for line, text in zip(lines, answers, strict=True))
    assert capsys.readouterr().out == wanted


def test_one_prompt_in_a_file_is_answered_like_one_on_the_command_line(
    sample, model, capsys, tmp_path
):
    (tmp_path / "prompt").write_text("import os\n")
    sample("--prompt-file", str(tmp_path / "prompt"), "--temperature=0")
    assert [capsys.readouterr().out] == model.generate("import os\n", **GREEDY)
    with pytest.raises(UserError, match="absent: no such file"):
        sample("--prompt-file", str(tmp_path / "absent"))


def test_text_ends_before_any_of_the_stop_strings(sample, model, capsys):
    (whole,) = model.generate("def f", **GREEDY)
    stop = whole[-2:]
    sample("--prompt", "def f", "--temperature=0", "--stop", "never seen", "--stop", stop)
    assert capsys.readouterr().out == whole[: whole.index(stop)]
    with pytest.raises(UserError, match=r"^stop="):
        sample("--stop", "")


def test_special_tokens_in_prompts_are_text_unless_asked_for(sample, model, capsys):
    sample("--prompt", "</s>def f", "--temperature=0")
    assert [capsys.readouterr().out] == model.generate("</s>def f", **GREEDY)
    sample("--prompt", "</s>def f", "--temperature=0", "--special-tokens")
    tokenizer = model.tokenizer
    ids = tokenizer.encode("</s>def f", bos=True, special=True)
    assert ids[:2] == [tokenizer.bos_id, tokenizer.eos_id]
    assert [capsys.readouterr().out] == model.generate([ids], **GREEDY)
