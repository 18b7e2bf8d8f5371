"""Completions: stop strings, and text, ids and log-probabilities in step."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from jllama.errors import UserError
from jllama.generate.completion import CompletionWriter, GenerationSettings


class Texts:
    """A stream of tokens that are their own texts; "/" stands for half a character."""

    def feed(self, token):
        return "" if token == "/" else token

    def end(self):
        return ""


def written(tokens, stop):
    """The completion of tokens, and the pieces that came one by one."""
    writer, pieces = CompletionWriter(Texts(), stop), []
    for i, token in enumerate(tokens):
        pieces.append(writer.feed(token, -float(i)))
        if writer.finish_reason:
            break
    else:
        pieces.append(writer.end("length"))
    return writer.completion(), pieces


@pytest.mark.parametrize(
    ("tokens", "stop", "text", "ids", "reason"),
    [
        (["ab", "cd"], [], "abcd", 2, "length"),
        (["ab", "\n", "\n", "cd"], ["\n\n"], "ab", 1, "stop"),  # over two tokens
        (["ab", "c.\n\nd", "e"], ["\n\n"], "abc.", 2, "stop"),  # inside of one, which stays
        (["ab", "cd"], ["cd"], "ab", 1, "stop"),
        (["ab", "cd"], ["ab"], "", 0, "stop"),
        (["ab", "cd"], ["cde"], "abcd", 2, "length"),  # begun and never whole
        (["a", "b", "c"], ["bcd", "c"], "ab", 2, "stop"),
        (["xabc"], ["abc", "b"], "xa", 1, "stop"),  # "b" is whole first
        (["xabc"], ["bc", "abc"], "x", 1, "stop"),  # both at once: the longer
        (["a", "/", "é", "/", "b"], ["b"], "aé", 3, "stop"),  # halves go with their character
    ],
)
def test_a_stop_string_ends_text_ids_and_logprobs_together(tokens, stop, text, ids, reason):
    completion, _ = written(tokens, stop)
    assert (completion.text, completion.finish_reason) == (text, reason)
    assert completion.ids == tuple(tokens[:ids])
    assert completion.logprobs == tuple(-float(i) for i in range(ids))


@hypothesis.given(
    text=st.text("ab", max_size=12),
    cuts=st.sets(st.integers(1, 11)),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_a_text_ends_at_the_same_place_whatever_its_tokens(text, cuts, stop):
    places = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    tokens = [text[a:b] for a, b in itertools.pairwise(places)]
    completion, pieces = written(tokens, stop)
    by_character, _ = written(text, stop)
    assert completion.text == by_character.text == "".join(pieces)
    assert completion.finish_reason == by_character.finish_reason
    assert not any(s in completion.text for s in stop)
    assert "".join(completion.ids).startswith(completion.text)
    assert len(completion.ids) == len(completion.logprobs)


def test_only_what_may_begin_a_stop_string_is_held_back():
    _, pieces = written(["a", "\n", "b", "\n", "\n"], ["\n\n"])
    assert pieces == ["a", "", "\nb", "", ""]


def test_a_stop_string_may_come_with_the_end_of_the_text():
    class Broken(Texts):
        def end(self):
            return "\ufffd"

    writer = CompletionWriter(Broken(), ["\ufffd"])
    assert writer.feed("a", 0.0) + writer.end("length") == "a"
    assert writer.completion().finish_reason == "stop"


@pytest.mark.parametrize("stop", ["", ["a", ""], [3]], ids=str)
def test_an_impossible_stop_string_is_an_error(stop):
    with pytest.raises(UserError, match=r"^stop="):
        GenerationSettings(stop=stop)
