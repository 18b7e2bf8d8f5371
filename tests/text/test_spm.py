"""SentencePiece models: the ids are SentencePiece's, with added tokens beside them."""

import hashlib
from io import BytesIO

import pytest
import sentencepiece
from text_samples import CHINESE, LONG, NASTY, SPELT

from jllama.errors import UserError
from jllama.text.added import AddedToken
from jllama.text.spm import SentencePieceTokenizer
from jllama.text.tokenizer import load_tokenizer

PAD, FOO = "[PAD]", "<foo>"


@pytest.fixture(scope="module")
def sp(spm_model):
    return sentencepiece.SentencePieceProcessor(model_proto=spm_model)


@pytest.fixture
def extended(spm_model, sp):
    """A tokenizer with a special and an ordinary token after the model's pieces."""

    def make(**kwargs):
        n = sp.vocab_size()
        tokens = (AddedToken(PAD, n), AddedToken(FOO, n + 1, special=False))
        return SentencePieceTokenizer(spm_model, added=tokens, **kwargs)

    return make


def test_ids_are_those_of_sentencepiece(made, sp, corpus):
    for text in [*corpus, *NASTY, *LONG]:
        assert made["spm"].encode(text) == sp.encode(text)


def test_llama2_ids_are_the_published_ones(data, made):
    assert made["spm"].encode("Hello world", bos=True) == [1, 15043, 3186]
    assert made["spm"].special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}


def test_a_chinese_model_gives_its_own_ids(data):
    path = data / "tokenizers" / "chinese_sp.model"
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(path)
    # Line by line, because Unigram scores are rounded over megabytes, which decides near ties.
    instructions = (data / "instruction" / "alpaca_zh_demo.json").read_text().splitlines()
    for text in [CHINESE, *instructions, *SPELT]:
        assert tokenizer.encode(text) == sp.encode(text)
    text = "今天天气很好,我们去公园散步。"
    assert tokenizer.decode(tokenizer.encode(text)) == sp.decode(sp.encode(text)) == text


def test_the_digest_of_a_model_is_that_of_its_file(made, spm_model):
    assert made["spm"].digest == hashlib.sha256(spm_model).hexdigest()
    assert made["spm"].files() == {"tokenizer.model": spm_model}


def test_long_texts_are_cut_without_a_trace(made, extended, library, monkeypatch):
    tokenizers = [made["trained"], made["spm"], extended(), extended(legacy=False)]
    text = FOO.join(library[:3])
    whole = [t.encode(text) for t in tokenizers]
    monkeypatch.setattr("jllama.text.spm._PART", 100)
    assert [t.encode(text) for t in tokenizers] == whole
    assert all(t.decode(ids) == text for t, ids in zip(tokenizers, whole, strict=True))


@pytest.mark.parametrize("legacy", [True, False])
def test_added_tokens_stand_beside_the_model(extended, sp, legacy):
    tokenizer = extended(legacy=legacy)
    n = sp.vocab_size()
    assert tokenizer.added_tokens == {PAD: n, FOO: n + 1}
    assert tokenizer.vocab_size == n + 2
    # The ids are the model's, with or without a space after an added token.
    after = sp.encode("b") if legacy else sp.encode("a b")[len(sp.encode("a ")) - 1 :]
    if not legacy:
        assert sp.decode([*sp.encode("a"), *tokenizer.encode(f"{FOO}b")[1:]]) == "ab"
    else:
        assert tokenizer.encode(f"{FOO}b")[1:] == after
    assert tokenizer.encode(f"a {FOO}")[:-1] == sp.encode("a ")
    assert tokenizer.encode(f"a{PAD}b") == sp.encode(f"a{PAD}b")
    assert tokenizer.encode(f"a{PAD}", special=True) == [*sp.encode("a"), n]
    for text in (f"{FOO}", f"a{FOO}b", f" {FOO} b {PAD}", f"{FOO}{FOO}  {FOO}", f"\n{FOO}\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        stream = tokenizer.stream()
        assert "".join(map(stream.feed, tokenizer.encode(text))) == text


def test_ids_between_the_model_and_an_added_token_have_no_text(spm_model, sp):
    n = sp.vocab_size()
    tokenizer = SentencePieceTokenizer(spm_model, added=[AddedToken(PAD, n + 3)])
    assert tokenizer.vocab_size == n + 4
    assert tokenizer.decode([n, n + 3]) == ""


@pytest.mark.parametrize(
    ("text", "id", "expected"),
    [
        (PAD, 5, r"\[PAD\]' has the id 5, which belongs to '<0x02>'"),
        ("<s>", 40, "<s>' has the id 40, but 1 elsewhere"),
        (PAD, -1, "impossible id -1"),
        (PAD, 1 << 40, "impossible id"),
    ],
)
def test_added_tokens_that_collide_are_an_error(spm_model, text, id, expected):
    with pytest.raises(UserError, match=f"^here: added token.*{expected}"):
        SentencePieceTokenizer(spm_model, "here", added=[AddedToken(text, id)])


def test_a_piece_that_is_special_by_name_is_spelt_by_letters(made, spm_model):
    plain = made["spm"]
    (id,) = plain.encode("in")
    piece = plain.pieces[id]
    tokenizer = SentencePieceTokenizer(spm_model, special=[piece])
    assert id not in tokenizer.encode("in")
    assert tokenizer.decode(tokenizer.encode("in")) == "in"
    assert tokenizer.encode(piece, special=True) == [id]
    assert tokenizer.decode([id]) == ""


def test_other_ends_than_the_models(extended, sp):
    tokenizer = extended(eos_token=FOO, stop_ids=[sp.eos_id()])
    assert tokenizer.eos_id == sp.vocab_size() + 1
    assert tokenizer.stop_ids == {sp.eos_id(), tokenizer.eos_id}
    assert tokenizer.encode(FOO) == sp.encode(FOO)
    with pytest.raises(UserError, match="bos_token '<b>' is not in the vocabulary"):
        extended(bos_token="<b>")
    with pytest.raises(UserError, match=r"eos_token_id 99999999 of .* is not in"):
        extended(stop_ids=[99_999_999])


def test_a_model_without_ends_is_an_error():
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"] * 9), model_writer=model, vocab_size=9, model_type="bpe",
        bos_id=-1, minloglevel=3,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"^here: bos_token: the model has none") as e:
        SentencePieceTokenizer(model.getvalue(), "here")
    assert "\n" not in str(e.value)
