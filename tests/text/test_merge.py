"""Merged vocabularies: the base keeps its ids, and sentencepiece gives the same ids."""

import json
import os
from io import BytesIO
from pathlib import Path

import pytest
import sentencepiece
from text_samples import CHINESE, NASTY

from jllama.config import TrainedTokenizer
from jllama.errors import UserError
from jllama.interop.hf_tokenizer import tokenizer_files
from jllama.text.infill import PIECES, infill_tokens
from jllama.text.merge import merge_vocabularies, spell_new_ids
from jllama.text.sentencepiece_model import Piece, PieceType, append_pieces, parse_sentencepiece
from jllama.text.spm import SentencePieceTokenizer
from jllama.text.tokenizer import TiktokenTokenizer, load_tokenizer
from jllama.text.vocabulary import train_sentencepiece

CODE = Path(__file__).read_text()


@pytest.fixture(scope="module")
def base():
    return train_sentencepiece([CODE], TrainedTokenizer(kind="train", vocab_size=400))


def sentencepiece_model(kind, text=CHINESE, **options):
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([part for part in text.split("。") if part] * 3),
        model_writer=model,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=3,
        **{"vocab_size": 120} | options,
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.fixture(scope="module", params=["unigram", "bpe", "char"])
def merged(request, base):
    return merge_vocabularies(
        base, sentencepiece_model(request.param), specials=["<a>"], pad="[PAD]"
    )


def pieces(tokenizer):
    return parse_sentencepiece(tokenizer.model).pieces


def test_ids_of_the_base_stay_and_new_pieces_follow_with_score_0(base, merged):
    old, new = pieces(base), pieces(merged.tokenizer)
    assert new[: len(old)] == old
    assert (merged.base, merged.base + merged.appended + 2) == (len(old), len(new))
    assert merged.appended > 20
    assert {(p.score, p.type) for p in new[len(old) : -2]} == {(0.0, PieceType.NORMAL)}
    assert [(p.text, p.type) for p in new[-2:]] == [("<a>", 3), ("[PAD]", 3)]
    assert len({p.text for p in new}) == len(new)


def test_sentencepiece_reads_it_and_encodes_alike(base, merged):
    sp = sentencepiece.SentencePieceProcessor(model_proto=merged.tokenizer.model)
    assert sp.vocab_size() == merged.tokenizer.vocab_size
    assert sp.pad_id() == sp.vocab_size() - 1
    for text in (CHINESE, CODE, "[PAD] <a> 人工", *NASTY):
        assert merged.tokenizer.encode(text) == sp.encode(text)
        assert merged.tokenizer.decode(merged.tokenizer.encode(text)) == text.replace("\u2581", " ")
    assert len(sp.encode(CHINESE)) < len(base.encode(CHINESE)) / 2


def test_special_tokens_are_none_of_the_text_unless_asked_for(merged):
    tokenizer = merged.tokenizer
    pad = tokenizer.vocab_size - 1
    assert tokenizer.special_tokens["[PAD]"] == pad
    assert pad not in tokenizer.encode("[PAD]")
    assert tokenizer.encode("[PAD]<a>", special=True) == [pad, pad - 1]


def test_it_is_saved_with_its_pad_token(merged, tmp_path):
    merged.tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.digest == merged.tokenizer.digest
    assert again.carried == {"pad_token": "[PAD]"}
    # The model's file has it too.
    alone = load_tokenizer(tmp_path / "tokenizer.model")
    for tokenizer in (again, alone):
        config = json.loads(tokenizer_files(tokenizer)["tokenizer_config.json"])
        assert config["pad_token"] == "[PAD]"


def test_what_is_special_in_new_is_no_piece_of_the_text(base, tmp_path):
    """Code Llama's model has its infill tokens as normal pieces."""
    more = [Piece(text, -1.0, PieceType.NORMAL) for text in ("☃☄", *PIECES)]
    (tmp_path / "new.model").write_bytes(append_pieces(base.model, more))
    made = merge_vocabularies(base, load_tokenizer(tmp_path / "new.model"), specials=PIECES)
    assert (made.appended, made.specials) == (1, 4)
    made.tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.digest == made.tokenizer.digest
    assert infill_tokens(again) == infill_tokens(made.tokenizer) == (401, 402, 403, 404)
    assert not {401, 402, 403, 404} & {*made.tokenizer.encode("☃☄ <PRE>")}


def test_pieces_that_no_merge_makes_are_counted(base):
    more = [Piece(text, -1.0, PieceType.NORMAL) for text in ("☃☄", "☃☄★", "♠♣♥")]
    made = merge_vocabularies(base, SentencePieceTokenizer(append_pieces(base.model, more)))
    # Neither "♠♣" nor "♣♥" is a piece.
    assert (made.appended, made.unreachable) == (3, 1)
    sp = sentencepiece.SentencePieceProcessor(model_proto=made.tokenizer.model)
    assert {400, 401} < set(sp.encode("☃☄★☃☄♠♣♥")) and 402 not in sp.encode("♠♣♥")


def test_new_pieces_are_spelt_by_the_bases(base, merged):
    spelt = spell_new_ids(base, merged.tokenizer)
    assert len(spelt) == merged.appended + 2
    assert spelt[-2:] == [[], []]
    for i, ids in enumerate(spelt[:-2]):
        piece = merged.tokenizer.pieces[merged.base + i]
        assert base.decode(ids) == piece.replace("\u2581", " ")
        assert max(ids) < merged.base


def test_a_space_before_the_text_is_no_part_of_a_piece():
    base = sentencepiece_model(
        "bpe", CHINESE, byte_fallback=True, remove_extra_whitespaces=False, vocab_size=400
    )
    new = sentencepiece_model("unigram", "xyz xyz xyz。xyz qq", vocab_size=12)
    made = merge_vocabularies(base, new)
    space = pieces(base).index(next(p for p in pieces(base) if p.text == "\u2581"))
    for i, ids in enumerate(spell_new_ids(base, made.tokenizer)):
        assert (space in ids) == ("\u2581" in made.tokenizer.pieces[made.base + i])


def test_another_vocabulary_is_refused_by_its_first_id(base, merged):
    with pytest.raises(UserError, match=r"has 400 ids and the model's own .*grows"):
        spell_new_ids(merged.tokenizer, base)
    other = train_sentencepiece([CODE[::-1]], TrainedTokenizer(kind="train", vocab_size=420))
    with pytest.raises(UserError, match=r"id \d+ is '.*', but '.*' in the model's own"):
        spell_new_ids(base, other)


def test_types_that_do_not_mix_are_one_line(base, llama3_model, merged):
    chinese = sentencepiece_model("unigram")
    tiktoken = TiktokenTokenizer(llama3_model, "file")
    for ours, theirs, expected in (
        (chinese, base, r"^BASE: .*type unigram.*must be of type bpe"),
        (
            base,
            sentencepiece_model("word", "a b c d。a b", vocab_size=8),
            r"^NEW: .*type word.*bpe",
        ),
        (tiktoken, base, r"^BASE: a Tiktoken tokenizer.*tokenizer\.model"),
        (base, tiktoken, r"^NEW: a Tiktoken tokenizer"),
        (base, sentencepiece_model("bpe", treat_whitespace_as_suffix=True), "different sides"),
    ):
        with pytest.raises(UserError, match=expected) as e:
            merge_vocabularies(ours, theirs)
        assert "\n" not in str(e.value)
    for tokens, why in (
        (["<s>"], "'<s>': already is a piece"),
        (["文"], "'文': already is a piece"),
        (["[X]", "x"], "'x': already is a piece"),
        (["[X]", "[X]"], r"'\[X\]': .*given twice"),
        ([""], "'': has no text"),
        (["a\0"], r"'a\\x00': is not printable"),
        (["\udcff"], r"'\\udcff': is not printable"),
    ):
        with pytest.raises(UserError, match=f"^special token {why}"):
            merge_vocabularies(base, chinese, specials=tokens)


def test_added_tokens_of_the_base_are_in_the_way(base, tmp_path):
    base.save(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 400}')
    with pytest.raises(UserError, match=r"^BASE: .*'<pad>' has the id 400.*--special '<pad>'"):
        merge_vocabularies(load_tokenizer(tmp_path), sentencepiece_model("bpe"))


@pytest.mark.skipif("JLLAMA_TEST_DATA" not in os.environ, reason="JLLAMA_TEST_DATA is unset")
def test_llama2_and_the_chinese_pieces_have_the_published_sizes():
    folder = Path(os.environ["JLLAMA_TEST_DATA"], "tokenizers")
    llama, chinese = (
        load_tokenizer(folder / f"{name}.model") for name in ("llama2_tokenizer", "chinese_sp")
    )
    made = merge_vocabularies(llama, chinese)
    assert made.tokenizer.vocab_size == 49_953
    padded = merge_vocabularies(llama, chinese, pad="[PAD]").tokenizer
    assert (padded.vocab_size, padded.special_tokens["[PAD]"]) == (49_954, 49_953)
    sp = sentencepiece.SentencePieceProcessor(model_proto=made.tokenizer.model)
    assert sp.vocab_size() == 49_953
    for text in (CHINESE, CODE, *NASTY):
        assert made.tokenizer.encode(text) == sp.encode(text)
    assert sp.encode("Hello world") == llama.encode("Hello world")
    assert sp.encode("人工智能", out_type=str) == ["\u2581", "人工智能"]
