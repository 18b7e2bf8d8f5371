"""The ids of a text to continue and of its continuation, with every kind of tokenizer."""

import hypothesis
import hypothesis.strategies as st
import pytest

from jllama.text.continuation import choice_ids, text_ids
from jllama.text.infill import encode_continued

words = st.text(st.sampled_from(" \n.(ab:Aé数"), max_size=8)


@hypothesis.given(prompt=words, choice=words.filter(len))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_prompt_and_choice_are_the_text_and_choices_share_the_prompt(tokenizer, prompt, choice):
    before, after = choice_ids(tokenizer, prompt, choice)
    assert tokenizer.decode([*before, *after]) == prompt + choice
    assert before == text_ids(tokenizer, prompt.rstrip())


def test_white_space_belongs_to_the_choice_on_whichever_side_it_is(tokenizer):
    question = "Question: is it so?\nAnswer:"
    wanted = choice_ids(tokenizer, question, " yes")
    assert choice_ids(tokenizer, question + " ", "yes") == wanted
    whole = tokenizer.encode(question + " yes", bos=True)
    assert wanted[0] + wanted[1] == whole
    assert wanted[0] == whole[: len(wanted[0])]


def test_a_token_that_would_span_the_boundary_is_not_made(tokenizer):
    prompt, choice = "the tabl", "e"
    before, after = choice_ids(tokenizer, prompt, choice)
    whole = tokenizer.encode(prompt + choice, bos=True)
    assert whole[: len(before)] != before  # it would be
    assert after == encode_continued(tokenizer, choice)
    assert tokenizer.decode(before + after) == "the table"


@pytest.mark.parametrize("tokenizer", ["spm", "llama3"], indirect=True)
def test_special_tokens_are_text_unless_asked_for(tokenizer):
    bos = next(text for text, id in tokenizer.special_tokens.items() if id == tokenizer.bos_id)
    plain = text_ids(tokenizer, f"{bos}a")
    assert plain.count(tokenizer.bos_id) == 1 and tokenizer.decode(plain) == f"{bos}a"
    # A prompt that brings its own BOS, as chat templates do, gets no second one.
    assert text_ids(tokenizer, f"{bos}a", special=True) == text_ids(tokenizer, "a")
    assert text_ids(tokenizer, f"a{bos}", special=True)[-1] == tokenizer.bos_id
    _, after = choice_ids(tokenizer, "a", f" b{bos}", special=True)
    assert after[-1] == tokenizer.bos_id
