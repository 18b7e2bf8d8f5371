"""Llama-3's tiktoken file: the ids are tiktoken's own."""

import base64
import re

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import LONG, NASTY
from tokenizer_files import tiktoken_file

from jllama.errors import UserError
from jllama.text import llama3
from jllama.text.llama3 import NUM_SPECIAL, PATTERN, TiktokenTokenizer

WHITE = [" ", "  ", "\n", "\r", "\t", "\u3000", "\x85", "\u2028"]
MIXED = st.lists(
    st.sampled_from([*WHITE, *WHITE, "a", ".", "1", "²", "世", "。", "\u0301", "\x1c"])
)


@pytest.fixture(scope="module")
def peer(ranks):
    ranks = {piece: i for i, piece in enumerate(ranks)}
    return tiktoken.Encoding("peer", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def test_ids_are_those_of_tiktoken(data, made, peer, corpus):
    assert peer.n_vocab >= 8_000
    instructions = (data / "instruction" / "alpaca_zh_demo.json").read_text()
    for text in [*corpus, instructions]:
        assert made["llama3"].encode(text) == peer.encode_ordinary(text)


@pytest.mark.parametrize("text", [*NASTY, *LONG], ids=lambda t: repr(t[:16]))
def test_odd_ids_are_those_of_tiktoken(made, peer, text):
    assert made["llama3"].encode(text) == peer.encode_ordinary(text)


@settings(max_examples=1000)
@given(parts=MIXED)
def test_a_cut_at_white_space_changes_no_id(made, peer, parts):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        short = llama3._LONG_RUN.pattern.replace(f"{llama3._RUN},", "2,")
        patch.setattr(llama3, "_LONG_RUN", re.compile(short))
        assert made["llama3"].encode(text) == peer.encode_ordinary(text)


@pytest.mark.parametrize(
    "text", ["a" + " " * 3_000_000 + "b", ".\n" + " " * 1_000_000, "ab" * 10**6]
)
def test_runs_that_tiktoken_panics_at_are_encoded(made, text):
    assert made["llama3"].decode(made["llama3"].encode(text)) == text


def test_special_tokens_come_after_the_ranks_in_llamas_order(made, ranks):
    tokenizer, n = made["llama3"], len(ranks)
    special = tokenizer.special_tokens
    assert len(special) == NUM_SPECIAL == tokenizer.vocab_size - n
    assert [special[t] - n for t in ("<|begin_of_text|>", "<|end_of_text|>")] == [0, 1]
    assert special["<|reserved_special_token_0|>"] - n == 2
    assert special["<|finetune_right_pad_id|>"] - n == 4
    assert [special[f"<|{t}|>"] - n for t in ("start_header_id", "end_header_id")] == [6, 7]
    assert [special[f"<|{t}|>"] - n for t in ("eom_id", "eot_id", "python_tag")] == [8, 9, 10]
    assert [special[f"<|reserved_special_token_{i}|>"] - n for i in (1, 2, 245)] == [3, 12, 255]
    assert (tokenizer.bos_id - n, tokenizer.eos_id - n) == (0, 1)
    assert tokenizer.stop_ids == {n + 1, n + 8, n + 9}


def test_a_chat_has_its_special_tokens_when_asked(made, ranks):
    tokenizer, n = made["llama3"], len(ranks)
    text = "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    ids = tokenizer.encode(text, bos=True, special=True)
    hi = tokenizer.encode("\n\nhi")
    assert ids == [n, n + 6, *tokenizer.encode("user"), n + 7, *hi, n + 9]
    assert not {i for i in tokenizer.encode(text) if i >= n}


def test_a_last_line_without_an_end_and_other_line_ends_are_read(made, llama3_model):
    for model in (llama3_model[:-1], llama3_model.replace(b"\n", b"\r\n")):
        assert TiktokenTokenizer(model).ranks == made["llama3"].ranks


def broken(ranks: list[bytes]) -> dict[str, tuple[bytes, str]]:
    lines = tiktoken_file(ranks).splitlines(keepends=True)
    piece = base64.b64encode(ranks[300])
    return {
        "cut in a piece": (b"".join(lines[:300]) + lines[300][:3], ":301: not a piece"),
        "cut in a rank": (b"".join(lines[:300]) + piece + b" 3", ":301: rank 3 where 300 is due"),
        "a gap": (b"".join(lines[:300] + lines[301:]), ":301: rank 301 where 300 is due"),
        "twice": (
            b"".join(lines[:301]) + piece + b" 301\n",
            ":302: repeats the piece .* of rank 300",
        ),
        "an empty line": (b"".join(lines[:9]) + b"\n", ":10: not a piece"),
        "words": (b"".join(lines[:9]) + b"a b c\n", ":10: not a piece"),
        "no base64": (b"".join(lines[:9]) + b"*** 9\n", ":10: not a piece"),
        "a huge rank": (b"".join(lines[:9]) + b"YQ== " + b"9" * 5000, ":10: not a piece"),
        "no bytes": (tiktoken_file(ranks[:200]), ":200: .* without the single byte"),
    }


@pytest.mark.parametrize("name", broken([bytes([i % 256]) * (1 + i // 256) for i in range(400)]))
def test_a_damaged_file_is_one_line_with_its_number(ranks, name):
    model, expected = broken(ranks)[name]
    with pytest.raises(UserError, match=f"^here{expected}") as e:
        TiktokenTokenizer(model, "here")
    assert "\n" not in str(e.value)


def test_other_ends_are_kept(made, llama3_model):
    tokenizer = TiktokenTokenizer(llama3_model, eos_token="<|eot_id|>")
    assert tokenizer.eos_id == made["llama3"].special_tokens["<|eot_id|>"]
    assert tokenizer.digest != made["llama3"].digest
    with pytest.raises(UserError, match="eos_token '</s>' is none of Llama-3's"):
        TiktokenTokenizer(llama3_model, eos_token="</s>")
