"""Infilling: Code Llama's ids, exact middles, and the prompts of a command line."""

import struct

import numpy as np
import pytest
import sentencepiece

from jllama.config import TrainedTokenizer
from jllama.errors import UserError
from jllama.text.added import AddedToken
from jllama.text.huggingface import HuggingFaceTokenizer
from jllama.text.infill import (
    PIECES,
    Infill,
    document_ids,
    encode_continued,
    infill_tokens,
    middle_stream,
    prompt_ids,
    prompts_from_options,
    random_cuts,
)
from jllama.text.spm import SentencePieceTokenizer
from jllama.text.tokenizer import load_tokenizer
from jllama.text.vocabulary import train_sentencepiece

# The pieces of Code Llama's tokenizer.model after Llama 2's, all of them of the normal type.
CODE_LLAMA = ["▁<SU", "▁<SUF", "▁<PRE", "▁<M", "▁<MID", "▁<E", "▁<EOT", *PIECES]
PRE, SUF, MID, EOT = 32007, 32008, 32009, 32010
TEXTS = ["def f(x):\n    return y\n", "  two  spaces \n", "naïve 数据 🙂\t\r\n", "a", "  ", "☺☺ ☺"]


def with_pieces(model: bytes, pieces: list[str]) -> bytes:
    """Appends normal pieces to the model: in a protocol buffer, repeated fields join."""
    for n, piece in enumerate(pieces):
        text = piece.encode()
        body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1e6 - n)
        model += b"\x0a" + bytes([len(body)]) + body
    return model


@pytest.fixture(scope="session")
def code_llama(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "tokenizer.model"
    base = (data / "tokenizers" / "llama2_tokenizer.model").read_bytes()
    path.write_bytes(with_pieces(base, CODE_LLAMA))
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def trained_infill(library):
    config = TrainedTokenizer(kind="train", vocab_size=800, max_bytes=300_000, infill=True)
    return train_sentencepiece(library, config)


@pytest.fixture(scope="session")
def spaced(spm_model, tmp_path_factory):
    """A tokenizer that adds a space before a text, as Code Llama's does."""
    path = tmp_path_factory.mktemp("spaced") / "tokenizer.model"
    path.write_bytes(with_pieces(spm_model, list(PIECES)))
    return load_tokenizer(path)


@pytest.fixture(params=["trained_infill", "spaced"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_code_llamas_ids_spelt_out(code_llama):
    assert infill_tokens(code_llama) == (PRE, SUF, MID, EOT)
    sp = sentencepiece.SentencePieceProcessor(model_proto=code_llama.model)
    prefix, middle, suffix = "def f(x): ", "return", " y"
    # "▁def ▁f ( x ): ▁", and without the implied space "return" and "▁y"
    pre, mid, suf = [822, 285, 29898, 29916, 1125, 29871], [2457], [343]
    assert sp.encode(prefix) == pre
    assert sp.encode("☺" + middle)[2:] == mid and sp.encode("☺" + suffix)[2:] == suf
    prompt = prompt_ids(code_llama, Infill(prefix, suffix))
    assert prompt == [1, PRE, *pre, SUF, *suf, MID]
    assert prompt_ids(code_llama, Infill(prefix, suffix, "spm")) == [1, PRE, SUF, *suf, MID, *pre]
    text, cuts = prefix + middle + suffix, (len(prefix), len(prefix + middle))
    assert document_ids(code_llama, text, cuts, "psm") == [*prompt, *mid, EOT]
    # Prefix and middle are encoded as one text: the space goes to "return".
    assert document_ids(code_llama, text, cuts, "spm") == [
        *(1, PRE, SUF, *suf, MID), *(822, 285, 29898, 29916, 1125, 736), EOT
    ]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_continued_text_is_the_models_without_its_prefix(code_llama, text):
    sp = sentencepiece.SentencePieceProcessor(model_proto=code_llama.model)
    assert encode_continued(code_llama, text) == sp.encode("☺" + text)[2:]
    assert sp.decode([*sp.encode("☺"), *encode_continued(code_llama, text)]) == "☺" + text


def test_a_vocabulary_may_join_the_smiling_face_with_what_follows(spm_model):
    known = SentencePieceTokenizer(spm_model).pieces
    joined = ["☺▁", "☺☺", "☺\ufe0f", "☺)", *(["☺"] if "☺" not in known else [])]
    joining = SentencePieceTokenizer(with_pieces(spm_model, joined))
    plain = SentencePieceTokenizer(spm_model)
    assert len(joining.encode("☺☺")) < len(plain.encode("☺☺"))
    for text in (" x", "☺ x", "\ufe0f y", ") z", "x"):
        ids = encode_continued(joining, text)
        assert decoded(joining.stream(after=joining.encode("☺")), ids) == text
        if "☺" not in text:
            assert ids == encode_continued(plain, text)


def test_pieces_are_not_made_from_text_though_the_model_would(code_llama, trained_infill):
    sp = sentencepiece.SentencePieceProcessor(model_proto=code_llama.model)
    text = "a <PRE> b <EOT>"
    for tokenizer in (code_llama, trained_infill):
        marks = {*infill_tokens(tokenizer)}
        for given in (text, *PIECES):
            assert not marks & {*tokenizer.encode(given)}
            assert tokenizer.decode(tokenizer.encode(given)) == given.replace("▁", " ")
        assert marks & {*tokenizer.encode("a▁<PRE>", special=True)}
    assert PRE in sp.encode(text)


def test_infill_tokens_are_saved_in_the_files(code_llama, tmp_path):
    code_llama.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert infill_tokens(again) == infill_tokens(code_llama)
    assert again.digest == code_llama.digest


def split(tokenizer, ids):
    """Returns the ids between the infill tokens of a training document."""
    pre, suf, mid, end = infill_tokens(tokenizer)
    assert ids[:2] == [tokenizer.bos_id, pre] and ids[-1] == end
    at = ids.index(suf), ids.index(mid)
    return ids[2 : at[0]], ids[at[0] + 1 : at[1]], ids[at[1] + 1 : -1]


def decoded(stream, ids):
    return "".join([stream.feed(i) for i in ids]) + stream.end()


def test_a_document_gives_its_text_back(tokenizer):
    random = np.random.default_rng(0)
    for text in TEXTS * 5:
        first, second = random_cuts(random, text)
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        continued = tokenizer.encode("☺")
        ids = split(tokenizer, document_ids(tokenizer, text, (first, second), "psm"))
        assert tokenizer.decode(ids[0]) == prefix
        assert decoded(tokenizer.stream(after=continued), ids[1]) == suffix
        assert decoded(middle_stream(tokenizer, Infill(prefix, suffix)), ids[2]) == middle
        ids = split(tokenizer, document_ids(tokenizer, text, (first, second), "spm"))
        assert ids[0] == []
        assert decoded(tokenizer.stream(after=continued), ids[1]) == suffix
        assert tokenizer.decode(ids[2]) == prefix + middle


def test_the_first_space_of_a_middle_is_its_own(tokenizer):
    """The ids after a prompt, encoded as in training, are decoded to exactly the middle."""
    for prefix, middle in (("", " x"), ("", "x"), ("a", " x"), ("a ", "x")):
        for format in ("psm", "spm"):
            infill = Infill(prefix, "", format)
            whole = document_ids(tokenizer, prefix + middle, (len(prefix), 10), format)
            prompt = prompt_ids(tokenizer, infill)
            if whole[: len(prompt)] == prompt:  # in SPM a piece may span both
                got = decoded(middle_stream(tokenizer, infill), whole[len(prompt) : -1])
                assert got == middle, (prefix, format)
            else:
                assert format == "spm"


def test_cuts_are_uniform_over_characters():
    random = np.random.default_rng(0)
    cuts = np.array([random_cuts(random, "abcd") for _ in range(20_000)])
    assert (cuts[:, 0] <= cuts[:, 1]).all()
    share = np.bincount(cuts.ravel(), minlength=5) / cuts.size
    assert np.abs(share - 0.2).max() < 0.01
    assert random_cuts(random, "") == (0, 0)


def added(spm_model):
    first = sentencepiece.SentencePieceProcessor(model_proto=spm_model).vocab_size()
    return [AddedToken(piece, first + i) for i, piece in enumerate(PIECES[:3])]


def test_a_tokenizer_without_the_pieces_is_one_line(spm_model):
    with pytest.raises(
        UserError, match=r"no ▁<PRE>, ▁<SUF>, ▁<MID>, ▁<EOT>; .*--infill, then grow.*infill=true"
    ):
        infill_tokens(SentencePieceTokenizer(spm_model))
    with pytest.raises(UserError, match="has no ▁<EOT>;"):
        infill_tokens(SentencePieceTokenizer(spm_model, special=PIECES[:3], added=added(spm_model)))


def test_added_tokens_of_other_files_serve_too(byte_json):
    first = max(t["id"] for t in byte_json["added_tokens"]) + 1
    more = [AddedToken(piece, first + i) for i, piece in enumerate(PIECES)]
    tokenizer = HuggingFaceTokenizer(byte_json, added=more)
    assert infill_tokens(tokenizer) == (first, first + 1, first + 2, first + 3)
    ids = document_ids(tokenizer, "one two three", (3, 7), "psm")
    pieces = split(tokenizer, ids)
    assert [tokenizer.decode(piece) for piece in pieces] == ["one", " three", " two"]


def test_a_command_line_says_what_to_fill(tmp_path):
    def parsed(*texts, format=None):
        return prompts_from_options([("--prompt", text) for text in texts], None, None, format)

    assert parsed() == [""]
    assert parsed("a <FILL_ME> b") == [Infill("a ", " b", "psm")]
    assert parsed("plain", "<FILL_ME>", format="spm") == ["plain", Infill("", "", "spm")]
    before, after = tmp_path / "before", tmp_path / "after"
    before.write_bytes(b"x = \r\n")
    after.write_bytes("é\n".encode())
    files = str(before), str(after)
    assert prompts_from_options([], *files, None) == [Infill("x = \r\n", "é\n")]
    assert prompts_from_options([], None, files[1], "spm") == [Infill("", "é\n", "spm")]


@pytest.mark.parametrize(
    ("prompts", "prefix", "format", "expected"),
    [
        (["x", "<FILL_ME> <FILL_ME>"], None, None, "--prompt: <FILL_ME> appears 2 times.*one"),
        (["text"], "file", None, "--prompt: .*--prefix-file.*--suffix-file"),
        ([""], "file", None, "--prompt: .*--prefix-file.*--suffix-file"),
        (["text"], None, "spm", "--infill-format spm: there is nothing to fill; write <FILL_ME>"),
        ([], "nowhere/file", None, "nowhere/file: no such file"),
    ],
)
def test_what_cannot_be_filled_is_one_line(prompts, prefix, format, expected):
    with pytest.raises(UserError, match=expected):
        prompts_from_options([("--prompt", text) for text in prompts], prefix, None, format)


def test_an_unknown_format_is_one_line(trained_infill):
    with pytest.raises(UserError, match="format 'pms' is unknown; psm or spm"):
        prompt_ids(trained_infill, Infill("a", "b", "pms"))
