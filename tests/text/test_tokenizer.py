"""Every kind: any text comes back, at once and streamed, and no special token is made from it."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import LONG, NASTY, SPELT, UNICODE
from tokenizer_files import KINDS

from jllama.errors import UserError
from jllama.text.tokenizer import load_tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))
PARTS = st.lists(st.sampled_from([*SPELT, " ", "a", "\n", "世", "🎉"])).map("".join)


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return "".join([stream.feed(i) for i in ids]) + stream.end()


def test_every_library_file_round_trips(trained, library):
    for text in library:
        assert trained.decode(trained.encode(text, bos=True, eos=True)) == text


def test_real_text_round_trips(tokenizer, corpus):
    for text in corpus:
        assert (
            tokenizer.decode(tokenizer.encode(text[:200_000], bos=True, eos=True))
            == (text[:200_000])
        )


def test_every_unicode_character_round_trips(tokenizer):
    for start in range(0, len(UNICODE), 4096):
        text = "".join(UNICODE[start : start + 4096])
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_unicode_character_round_trips_alone(made):
    for kind in ("trained", "spm", "llama3", "json_prepend"):
        for letter in UNICODE if kind == "llama3" else UNICODE[::97] + UNICODE[:0x3000]:
            assert made[kind].decode(made[kind].encode(letter)) == letter


@pytest.mark.parametrize("kind", KINDS)
def test_the_space_mark_is_the_one_exception(made, kind):
    tokenizer = made[kind]
    bytes_only = kind in ("llama3", "json_bytes")
    for text in ("a\u2581b", "\u2581", "\u2581a", " \u2581 "):
        back = tokenizer.decode(tokenizer.encode(text))
        assert back == (text if bytes_only else text.replace("\u2581", " "))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=st.one_of(TEXTS, PARTS))
def test_any_text_round_trips_whole_and_streamed(made, kind, text):
    tokenizer = made[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text == streamed(tokenizer, ids)
    assert not ids or 0 <= min(ids) <= max(ids) < tokenizer.vocab_size


@pytest.mark.parametrize("text", NASTY, ids=lambda t: repr(t[:16]))
def test_odd_texts_round_trip_without_special_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(tokenizer.special_tokens.values()) & set(ids)


@pytest.mark.parametrize("text", LONG, ids=lambda t: repr(t[:2]))
def test_long_runs_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_come_from_text_when_asked(tokenizer):
    for text, id in tokenizer.special_tokens.items():
        ids = tokenizer.encode(f"a{text}", special=True)
        assert ids == [*tokenizer.encode("a"), id]
        assert tokenizer.decode(ids) == "a"
    assert {tokenizer.bos_id, tokenizer.eos_id} <= set(tokenizer.special_tokens.values())
    assert tokenizer.eos_id in tokenizer.stop_ids


def test_ends_are_added_when_asked(tokenizer):
    ids = tokenizer.encode("a b")
    assert tokenizer.encode("a b", bos=True) == [tokenizer.bos_id, *ids]
    assert tokenizer.encode("a b", eos=True) == [*ids, tokenizer.eos_id]
    assert tokenizer.encode("", bos=True, eos=True) == [tokenizer.bos_id, tokenizer.eos_id]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_stream_is_decode_and_never_cuts_a_character(made, kind, data):
    tokenizer = made[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    stream = tokenizer.stream()
    assert all("\ufffd" not in stream.feed(i) for i in tokenizer.encode("🎉é世👩‍👧"))
    assert stream.end() == ""


def test_broken_utf8_is_replaced_and_what_follows_is_kept(tokenizer):
    (*ids, _) = tokenizer.encode("a\U000e0001")  # no vocabulary has a piece for this character
    assert tokenizer.decode([*ids, *tokenizer.encode("\n")]).strip(" \n") == "a\ufffd"
    stream = tokenizer.stream()
    assert "".join(map(stream.feed, ids)) == "a"
    assert stream.end() == "\ufffd"


def test_a_stream_after_a_prompt_keeps_the_space(tokenizer):
    ids = tokenizer.encode("a b c")
    for n in range(1, len(ids)):
        stream = tokenizer.stream(after=ids[:n])
        rest = "".join([stream.feed(i) for i in ids[n:]]) + stream.end()
        assert tokenizer.decode(ids[:n]) + rest == "a b c"


def test_ids_outside_the_vocabulary_are_an_error(tokenizer):
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(UserError, match=f"token {bad}"):
            tokenizer.decode([bad])


def test_unpaired_surrogates_are_an_error(tokenizer):
    with pytest.raises(UserError, match="U\\+D800 at character 2"):
        tokenizer.encode("ab\ud800")


def test_saving_loading_and_pickling_keep_it(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(tokenizer.files())
    text = "def f(x):\n    return x</s> é世"
    for other in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert other.digest == tokenizer.digest
        assert other.encode(text, special=True) == tokenizer.encode(text, special=True)
        assert other.special_tokens == tokenizer.special_tokens
        assert other.stop_ids == tokenizer.stop_ids
        assert (other.bos_id, other.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_what_is_carried_for_others_is_pickled_too(tokenizer):
    carrying = pickle.loads(pickle.dumps(tokenizer))
    carrying.carried = {"padding_side": "left"}
    assert pickle.loads(pickle.dumps(carrying)).carried == carrying.carried


def test_digests_tell_tokenizers_apart(made):
    assert len({tokenizer.digest for tokenizer in made.values()}) == len(made)
