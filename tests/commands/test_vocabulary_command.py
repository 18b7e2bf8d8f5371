"""`jllama vocabulary`: train, merge, compare, grow; and what they refuse."""

import dataclasses
import json
import re
import shlex
import shutil

import jax
import numpy as np
import pytest
import sentencepiece
import tiny

import jllama
from jllama.adapt.lora import overlay_specs
from jllama.cli import main
from jllama.config import LoraConfig
from jllama.interop import hf
from jllama.interop.peft_write import write_adapter
from jllama.store.find import find
from jllama.store.model import open_model
from jllama.store.write import write_model
from jllama.text.added import AddedToken
from jllama.text.infill import infill_tokens
from jllama.text.spm import SentencePieceTokenizer

ENGLISH = "The quick brown fox jumps over the lazy dog.\nPack my box with jugs.\n" * 20
FRENCH = "Voilà l'été où naïfs élèves rêvèrent déjà.\nÇa gêne où l'âme s'élève.\n" * 20


def vocabulary(*words):
    return main(["vocabulary", *map(str, words)])


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Two texts, their tokenizers `base` and `new.model`, both merged, and a model of the first."""
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "en.txt").write_text(ENGLISH)
    (folder / "fr.txt").write_text(FRENCH)
    assert vocabulary("train", folder / "en.txt", "--size", 320, "--out", folder / "base") == 0
    assert vocabulary("train", folder / "fr.txt", "--size", 330, "--out", folder / "new.model") == 0
    words = (folder / "base", folder / "new.model", "--out", folder / "merged", "--pad", "[PAD]")
    assert vocabulary("merge", *words) == 0
    model = tiny.config(vocab_size=320, num_layers=2, num_kv_heads=2, max_length=64)
    tokenizer = jllama.load_tokenizer(folder / "base")
    write_model(folder / "model", model, tiny.params(model), tokenizer)
    hf.write_folder(folder / "hf", model, tiny.params(model), tokenizer)
    return folder


def refused(capsys, *words):
    """The one line of a command that makes nothing."""
    capsys.readouterr()
    assert vocabulary(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_training_is_that_of_recipes_and_says_its_size(here, tmp_path, capsys):
    one, two = tmp_path / "one.model", tmp_path / "two.model"
    for out in (one, two):
        assert vocabulary("train", here / "*.txt", "--size", 310, "--out", out) == 0
    assert capsys.readouterr().out.splitlines() == [f"{p}: 310 pieces" for p in (one, two)]
    assert one.read_bytes() == two.read_bytes()
    assert sentencepiece.SentencePieceProcessor(model_file=str(one)).vocab_size() == 310


def test_each_of_several_texts_gives_its_share_of_the_bytes(here, tmp_path, capsys):
    out = tmp_path / "o.model"
    words = ("train", here / "en.txt", here / "fr.txt", "--size", 320, "--out", out)
    assert vocabulary(*words, "--max-bytes", 800) == 0
    assert "note: 800 of " in capsys.readouterr().err
    pieces = jllama.load_tokenizer(out).pieces
    assert "é" in pieces and "w" in pieces


def test_merged_keeps_the_base_and_compares_shorter(here, capsys):
    base, merged = (jllama.load_tokenizer(here / name) for name in ("base", "merged"))
    assert merged.pieces[:320] == base.pieces
    assert merged.pieces[-1] == "[PAD]" and merged.carried == {"pad_token": "[PAD]"}
    texts = ("--text", here / "fr.txt", here / "en.txt")
    assert vocabulary("compare", here / "base", here / "merged", *texts, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["text"] for row in rows] == [str(t) for t in texts[1:] for _ in "ab"] + ["all"] * 2
    for row in rows[:2]:
        tokenizer = jllama.load_tokenizer(row["tokenizer"])
        tokens = len(tokenizer.encode(FRENCH))
        assert (row["tokens"], row["characters"]) == (tokens, len(FRENCH))
        assert row["tokens_per_character"] == tokens / len(FRENCH)
        assert row["characters_per_token"] == len(FRENCH) / tokens
    assert rows[1]["tokens"] < rows[0]["tokens"] * 0.7
    assert rows[4]["tokens"] == rows[0]["tokens"] + rows[2]["tokens"]
    assert vocabulary("compare", here / "base", *texts) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "text" and len(lines) == 4 and len(set(map(len, lines))) == 1


def test_a_vocabulary_gets_the_tokens_of_infilling_and_no_other_pieces(here, tmp_path, capsys):
    capsys.readouterr()
    out = tmp_path / "infill"
    assert vocabulary("merge", here / "base", "--infill", "--out", out) == 0
    assert capsys.readouterr().out == f"{out}: 324 pieces: 320 of {here / 'base'}, 4 special\n"
    base, grown = map(jllama.load_tokenizer, (here / "base", out))
    assert infill_tokens(grown) == (320, 321, 322, 323)
    text = "quick ▁<PRE> <PRE> fox"
    assert grown.encode(text) == base.encode(text)
    assert "nothing to merge: give NEW" in refused(
        capsys, "merge", here / "base", "--out", tmp_path / "x"
    )
    assert vocabulary("merge", here / "base", "--pad", "[PAD]", "--out", tmp_path / "pad") == 0
    assert jllama.load_tokenizer(tmp_path / "pad").special_tokens["[PAD]"] == 320
    trained = tmp_path / "t.model"
    words = ("train", here / "en.txt", "--size", 320, "--infill", "--out", trained)
    assert vocabulary(*words) == 0
    assert max(infill_tokens(jllama.load_tokenizer(trained))) < 320


@pytest.mark.parametrize("source", ["model", "hf"])
def test_a_model_grows_and_is_the_same_for_old_tokens(here, source, tmp_path, capsys):
    out = tmp_path / "grown"
    assert vocabulary("grow", here / source, here / "merged", out, "--multiple", 64) == 0
    merged = jllama.load_tokenizer(here / "merged")
    said = capsys.readouterr().out
    assert f"{merged.vocab_size:,} ids: 320 of {here / source} and" in said
    assert "rows of padding" in said
    before, after = jllama.load(here / source), jllama.load(out)
    assert after.tokenizer.digest == merged.digest
    assert after.config.vocab_size == merged.vocab_size
    assert after.params["head"]["weight"].shape[0] == after.config.vocab_rows == 384
    ids = [before.tokenizer.encode("The lazy dog jumps over my box.")]
    np.testing.assert_array_equal(after.logits(ids)[..., :320], before.logits(ids))
    new = next(i for i in range(320, merged.vocab_size) if len(merged.pieces[i]) > 2)
    spelt = before.tokenizer.encode(merged.pieces[new].replace("\u2581", " "))
    for name in ("embedding", "head"):
        table = np.asarray(after.params[name]["weight"])
        np.testing.assert_allclose(table[new], table[spelt].mean(0), rtol=1e-5, atol=1e-8)
    # And so in other formats, without the padding.
    assert main(["convert", str(out), str(tmp_path / "hf"), "--to", "hf"]) == 0
    again = jllama.load(tmp_path / "hf")
    assert again.params["head"]["weight"].shape[0] == merged.vocab_size
    assert (
        json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["pad_token"] == "[PAD]"
    )
    np.testing.assert_array_equal(again.logits(ids), after.logits(ids))


def test_a_model_without_a_tokenizer_grows_by_what_needs_none(here, tmp_path, capsys):
    stored = open_model(find(here / "model"))
    write_model(tmp_path / "bare", stored.config, tiny.params(stored.config), None)
    grow = ("grow", tmp_path / "bare", here / "merged", tmp_path / "out")
    assert "no tokenizer to spell new pieces with" in refused(capsys, *grow)
    assert "320 rows: a vocabulary can grow" in refused(
        capsys, "grow", tmp_path / "bare", _small(tmp_path), tmp_path / "out", "--rows", "mean"
    )
    assert vocabulary(*grow, "--rows", "random", "--seed", 3) == 0
    assert "cannot be checked" in capsys.readouterr().err
    # The ways out that the message names.
    assert vocabulary(*grow[:3], tmp_path / "mean", "--rows", "mean") == 0
    unreadable = tmp_path / "bare" / "tokenizer.json"
    unreadable.write_text('{"model": {"type": "WordPiece", "vocab": {"a": 0}}}')
    shutil.copy(here / "base" / "tokenizer.model", tmp_path / "bare")
    assert vocabulary(*grow[:3], tmp_path / "spelt") == 2
    assert "there, in place of a tokenizer.json, or" in capsys.readouterr().err.splitlines()[-1]
    unreadable.unlink()
    assert vocabulary(*grow[:3], tmp_path / "spelt") == 0


@pytest.mark.parametrize("source", ["model", "hf"])
def test_a_model_grows_to_what_is_merged_with_its_own_tokenizer(here, source, tmp_path, capsys):
    grow = ("grow", here / source)
    for other in (here / "new.model", _small(tmp_path)):
        assert "merge" in refused(capsys, *grow, other, tmp_path / "out")
    own = tmp_path / "own"
    assert vocabulary("merge", here / source, here / "new.model", "--out", own) == 0
    assert vocabulary(*grow, own, tmp_path / "out") == 0
    grown = jllama.load(tmp_path / "out")
    assert grown.tokenizer.digest == jllama.load_tokenizer(own).digest


def test_a_base_with_added_tokens_has_them_put_into_its_model_first(here, tmp_path, capsys):
    stored = open_model(find(here / "model")).config
    wider = dataclasses.replace(stored, vocab_size=322)
    tokens = [AddedToken("<a b>", 320), AddedToken("<pad>", 321)]
    tokenizer = SentencePieceTokenizer(jllama.load_tokenizer(here / "base").model, added=tokens)
    write_model(tmp_path / "padded", wider, tiny.params(wider), tokenizer)
    out = tmp_path / "merged"
    merge = ("merge", tmp_path / "padded", here / "new.model", "--out", out)
    said = refused(capsys, *merge)
    assert "its folder adds tokens to the model ('<a b>' has the id 320)" in said
    command = shlex.split(re.search(r"\(jllama vocabulary (.*)\), and give that", said)[1])
    first = tmp_path / "first.model"
    assert vocabulary(*(first if word == "FILE.model" else word for word in command)) == 0
    assert vocabulary("merge", first, here / "new.model", "--out", out) == 0
    assert vocabulary("grow", tmp_path / "padded", out, tmp_path / "grown") == 0
    grown = jllama.load(tmp_path / "grown").tokenizer
    assert [grown.special_tokens[token.text] for token in tokens] == [320, 321]
    # Tokens apart from the pieces, or found in any text, cannot keep their ids so.
    for apart in ([AddedToken("<pad>", 325)], [AddedToken("hello", 320, special=False)]):
        SentencePieceTokenizer(tokenizer.model, added=apart).save(tmp_path / "apart")
        merge = ("merge", tmp_path / "apart", here / "new.model", "--out", tmp_path / "none")
        said = refused(capsys, *merge)
        assert "give its tokenizer.model alone" in said and "they get other ids" in said
        text, plain = apart[0].text, tmp_path / "apart" / "tokenizer.model"
        assert f" by --special {shlex.quote(text)}: " in said
        assert said.endswith(f"jllama convert MODEL DST --tokenizer {plain}\n")
        name = f"without {text[1:3]}"
        padded = tiny.config(vocab_size=326, num_layers=2)
        tokenizer = jllama.load_tokenizer(tmp_path / "apart")
        write_model(tmp_path / name, padded, tiny.params(padded), tokenizer)
        made, base = tmp_path / f"merged {name}", tmp_path / f"base {name}"
        words = ("merge", plain, here / "new.model", "--special", text, "--out", made)
        assert vocabulary(*words) == 0
        assert "which keeps its ids" in refused(capsys, "grow", tmp_path / name, made, base)
        convert = ["convert", tmp_path / name, base, "--to", "jllama", "--tokenizer", plain]
        assert main([*map(str, convert)]) == 0
        assert vocabulary("grow", base, made, tmp_path / f"grown {name}") == 0
        grown = jllama.load(tmp_path / f"grown {name}").tokenizer
        assert grown.special_tokens[text] > 320


def test_the_file_that_is_named_for_a_step_is_the_runs(here, tmp_path, capsys):
    tokenizer = jllama.load_tokenizer(here / "base")
    added = [AddedToken("<pad>", 325)]
    SentencePieceTokenizer(tokenizer.model, added=added).save(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    words = ("merge", tmp_path / "run" / "checkpoints" / "3", here / "new.model", "--out")
    said = refused(capsys, *words, tmp_path / "out")
    assert said.endswith(f"--tokenizer {tmp_path / 'run' / 'tokenizer.model'}\n")


def test_an_adapter_of_a_grown_vocabulary_goes_with_the_grown_model(here, tmp_path):
    merged = jllama.load_tokenizer(here / "merged")
    base = open_model(find(here / "model")).config
    grown = dataclasses.replace(base, vocab_size=merged.vocab_size)
    adapt = LoraConfig(kind="lora", rank=2, alpha=4.0, targets=("q",), full=("embedding", "head"))

    def write(folder, config):
        specs = overlay_specs(config, tiny.compute(), adapt)
        overlay = jax.tree.map(lambda spec: np.ones(spec.shape, np.float32), specs)
        write_adapter(folder, config, adapt, overlay, "base")

    write(tmp_path / "peft", grown)
    said = rf"has {merged.vocab_size:,} tokens, and the model has 320: .*jllama vocabulary grow"
    with pytest.raises(jllama.UserError, match=said):
        jllama.load(here / "model", adapter=tmp_path / "peft")
    assert vocabulary("grow", here / "model", here / "merged", tmp_path / "grown") == 0
    model = jllama.load(tmp_path / "grown", adapter=tmp_path / "peft")
    assert model.logits([[1, merged.vocab_size - 1]]).shape[-1] == merged.vocab_size
    # Others pad the rows to a multiple, which a tokenizer has no ids for.
    rows = merged.vocab_size + 2
    write(tmp_path / "padded", dataclasses.replace(base, vocab_size=rows))
    with pytest.raises(jllama.UserError, match=r"fewer ids gets more by the --special of jllama"):
        jllama.load(tmp_path / "grown", adapter=tmp_path / "padded")
    more, wider = tmp_path / "more", tmp_path / "wider"
    words = ("--special", "<1>", "--special", "<2>", "--out", more)
    assert vocabulary("merge", here / "merged", *words) == 0
    assert vocabulary("grow", here / "model", more, wider) == 0
    assert jllama.load(wider, adapter=tmp_path / "padded").config.vocab_size == rows


def test_a_model_learns_to_infill_once_it_has_grown_by_the_tokens(here, tmp_path):
    with pytest.raises(jllama.UserError, match=r"jllama vocabulary merge --infill, then grow"):
        jllama.load(here / "model").infill("a", "b")
    out = tmp_path / "infill"
    assert vocabulary("merge", here / "model", "--infill", "--out", out) == 0
    assert vocabulary("grow", here / "model", out, tmp_path / "grown") == 0
    jllama.load(tmp_path / "grown").infill("a", "b", max_new_tokens=2)


def test_a_tokenizer_with_more_ids_than_rows_is_not_the_models_own(here, tmp_path, capsys):
    """As after putting the merged one into the folder: its new ids would get rows of zeros."""
    shutil.copytree(here / "model", tmp_path / "mixed")
    jllama.load_tokenizer(here / "merged").save(tmp_path / "mixed")
    said = refused(capsys, "grow", tmp_path / "mixed", here / "merged", tmp_path / "out")
    assert "the embedding 320 rows: it is another model's" in said
    (tmp_path / "mixed" / "tokenizer.model").unlink()  # the way out
    rows = ("--rows", "random")
    assert vocabulary("grow", tmp_path / "mixed", here / "merged", tmp_path / "out", *rows) == 0
    shutil.rmtree(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _small(folder):
    (folder / "s.txt").write_text(ENGLISH)
    assert vocabulary("train", folder / "s.txt", "--size", 300, "--out", folder / "s.model") == 0
    return folder / "s.model"


def test_text_that_is_not_utf_8_is_converted_or_left_out(here, tmp_path, capsys):
    out, latin = tmp_path / "out", tmp_path / "latin.txt"
    latin.write_bytes(FRENCH.encode("latin-1"))
    words = ("--size", 320, "--out", out)
    said = refused(capsys, "train", here / "en.txt", latin, *words)
    assert "latin.txt: not UTF-8" in said and "; convert it, or leave it out" in said
    assert vocabulary("train", here / "en.txt", *words) == 0
    latin.write_text(latin.read_text(encoding="latin-1"))
    assert vocabulary("train", here / "en.txt", latin, *words[:3], tmp_path / "both") == 0
    assert "é" in jllama.load_tokenizer(tmp_path / "both").pieces


def test_bad_input_is_one_line_and_makes_nothing(here, tmp_path, capsys):
    out = tmp_path / "out"
    text, base, new = here / "en.txt", here / "base", here / "new.model"
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    for said, *words in (
        ("--size 20: must be at least 300", "train", text, "--size", 20, "--out", out),
        ("--max-bytes 0: ", "train", text, "--size", 300, "--max-bytes", 0, "--out", out),
        ("as int", "train", text, "--size", 10**10, "--out", out),
        ("--size=3000: the text gives only", "train", text, "--size", 3000, "--out", out),
        ("no file matches", "train", tmp_path / "no.txt", "--size", 300, "--out", out),
        ("latin.txt: not UTF-8", "train", tmp_path / "latin.txt", "--size", 300, "--out", out),
        ("no text", "train", tmp_path / "empty.txt", "--size", 300, "--out", out),
        ("exists; choose", "train", text, "--size", 300, "--out", base),
        ("exists; choose", "merge", base, new, "--out", new),
        ("has no piece that", "merge", base, base, "--out", out),
        ("already is a piece", "merge", base, new, "--pad", "<s>", "--out", out),
        ("no: no such file", "merge", base, tmp_path / "no", "--out", out),
        ("no such tokenizer", "merge", base, "", "--out", out),
        ("is not printable", "merge", base, "--special", "\udcff", "--out", out),
        ("empty.txt: is empty", "compare", base, "--text", tmp_path / "empty.txt"),
        ("required: --text", "compare", base),
        ("required: ACTION",),
        ("which keeps its ids", "grow", here / "model", new, out),
        ("own 320: a vocabulary grows", "grow", here / "model", _small(tmp_path), out),
        ("--multiple 0: ", "grow", here / "model", here / "merged", out, "--multiple", 0),
        ("--seed -1", "grow", here / "model", here / "merged", out, "--seed", -1),
        ("exists; choose", "grow", here / "model", here / "merged", here / "hf"),
        ("DST is empty", "grow", here / "model", here / "merged", ""),
        ("no such folder", "grow", tmp_path / "no", here / "merged", out),
    ):  # fmt: skip
        assert said in refused(capsys, *words)
        assert not out.exists()
