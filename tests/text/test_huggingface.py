"""tokenizer.json: the ids are those of `tokenizers`; a lossy tokenizer is refused."""

import copy
import json
import time

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import LONG, NASTY
from tokenizer_files import added, doubled, ids, marked, metaspace, peer

from jllama.errors import UserError
from jllama.text.huggingface import HuggingFaceTokenizer

# Added tokens that are not special, with flags of every kind.
VISIBLE = {"<foo>": {}, "<foo><foo>": {}, "<b>": {"single_word": True}, "<n>": {"normalized": True}}
STRIPS = {"<l>": {"lstrip": True}, "<r>": {"rstrip": True}}
WORDS = [*VISIBLE, *STRIPS, " ", "  ", "\n", "a", "b", ".", "</s>", "<|eot_id|>", "世"]


@pytest.fixture(scope="session")
def files(byte_json, spm_json):
    return {
        "json_bytes": byte_json,
        "json_prepend": spm_json,
        "json_first": metaspace(spm_json, "first"),
        "json_always": metaspace(spm_json, "always"),
        "json_marked": marked(spm_json),
        "json_doubled": doubled(spm_json),
    }


JSONS = ["json_bytes", "json_prepend", "json_first", "json_always", "json_marked", "json_doubled"]


@pytest.fixture(params=JSONS)
def file(request, files):
    return files[request.param]


def extend(file: dict, tokens: dict[str, dict]) -> dict:
    first = 1 + max(t["id"] for t in file["added_tokens"])
    first = max(first, len(file["model"]["vocab"]))
    more = [added(t, first + i, special=False, **f) for i, (t, f) in enumerate(tokens.items())]
    return file | {"added_tokens": file["added_tokens"] + more}


def test_ids_are_those_of_tokenizers(file, corpus):
    tokenizer, other = HuggingFaceTokenizer(file), peer(file)
    for text in [*(text[:150_000] for text in corpus), *NASTY, *LONG]:
        # A Metaspace adds no space before a text that begins with one, so that space is lost.
        metaspace = (file["pre_tokenizer"] or {}).get("type") == "Metaspace"
        taken = " " if metaspace and text[:1] in (" ", "\u2581") else ""
        assert tokenizer.encode(text) == ids(other, taken + text)


def test_the_spaced_family_gives_the_ids_of_sentencepiece(made, spm_model, corpus):
    sp = sentencepiece.SentencePieceProcessor(model_proto=spm_model)
    for text in [*corpus, *NASTY]:
        wanted = sp.encode(text)
        assert made["json_prepend"].encode(text) == wanted
        if len(text) < 200_000:
            assert made["json_first"].encode(text) == made["json_always"].encode(text) == wanted


def test_the_byte_family_gives_the_ids_of_tiktoken(made, corpus):
    for text in [*corpus, *NASTY, *LONG]:
        assert made["json_bytes"].encode(text) == made["llama3"].encode(text)
    assert made["json_bytes"].special_tokens == made["llama3"].special_tokens
    assert made["json_bytes"].stop_ids == made["llama3"].stop_ids


@pytest.fixture(scope="module")
def extended(files):
    return {
        kind: (file, HuggingFaceTokenizer(file))
        for kind, file in ((k, extend(f, VISIBLE | STRIPS)) for k, f in files.items())
    }


@pytest.mark.parametrize("kind", JSONS)
@pytest.mark.parametrize("special", [False, True])
@settings(max_examples=150)
@given(parts=st.lists(st.sampled_from(WORDS)))
def test_added_tokens_are_found_as_tokenizers_finds_them(extended, kind, special, parts):
    file, tokenizer = extended[kind]
    text = "".join(parts)
    if kind in ("json_first", "json_always", "json_doubled"):
        text = text.replace(" ", "")  # see above: a space after every token is lost
    assert tokenizer.encode(text, special=special) == ids(peer_of(kind, file, special), text)


_PEERS = {}


def peer_of(kind, file, special):
    if (kind, special) not in _PEERS:
        _PEERS[kind, special] = peer(file, special)
    return _PEERS[kind, special]


@pytest.mark.parametrize("kind", JSONS)
@settings(max_examples=150)
@given(parts=st.lists(st.sampled_from([w for w in WORDS if w not in STRIPS])))
def test_texts_with_added_tokens_come_back(extended, kind, parts):
    _, tokenizer = extended[kind]
    text = "".join(parts)
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded) == text
    assert not set(tokenizer.special_tokens.values()) & set(encoded)
    stream = tokenizer.stream()
    assert "".join([stream.feed(i) for i in encoded]) + stream.end() == text


def test_many_tokens_and_long_runs_are_searched_in_little_time(extended, made):
    began = time.process_time()
    for text in (" " * 300_000, "<" * 300_000, "a<|b " * 60_000):
        for tokenizer in (extended["json_bytes"][1], made["llama3"]):
            assert tokenizer.decode(tokenizer.encode(text, special=True)) == text
    assert time.process_time() - began < 20


def test_many_added_tokens_take_little_time(spm_json):
    start = 1 + max(spm_json["model"]["vocab"].values())
    many = [added(f"<{i}>", start + i) | {"normalized": True} for i in range(4000)]
    seconds = []
    for _ in range(3):  # the machine may be busy with other things
        before = time.process_time()
        HuggingFaceTokenizer(spm_json | {"added_tokens": spm_json["added_tokens"] + many})
        seconds.append(time.process_time() - before)
    assert min(seconds) < 1  # 0.04 s; a search through a list for each took 2.3 s


def test_truncation_padding_and_template_have_no_effect(made, byte_json):
    file = byte_json | {
        "truncation": {
            "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
        },
        "padding": {
            "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|end_of_text|>",
        },
    }  # fmt: skip
    assert len(peer(file).encode("a").ids) == 64  # `tokenizers` does pad
    tokenizer = HuggingFaceTokenizer(file)
    assert tokenizer.encode("one two three four") == made["json_bytes"].encode("one two three four")
    assert tokenizer.json == file and json.loads(tokenizer.files()["tokenizer.json"]) == file


def test_a_special_token_in_the_vocabulary_is_never_made_from_text(spm_json):
    # "in" is a piece, which another file declares special.
    tokenizer = HuggingFaceTokenizer(spm_json, special=["\u2581in"])
    (id,) = ids(peer(spm_json), "in")
    assert tokenizer.special_tokens["\u2581in"] == id
    assert id not in tokenizer.encode("in in in")
    assert tokenizer.decode(tokenizer.encode("in in in")) == "in in in"


def test_the_ends_are_special_whatever_the_file_says(spm_json):
    file = copy.deepcopy(spm_json)
    for token in file["added_tokens"]:
        token["special"] = False
    tokenizer = HuggingFaceTokenizer(file)
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert tokenizer.decode(tokenizer.encode("</s>")) == "</s>"


def changed(file: dict, path: str, value) -> dict:
    file = copy.deepcopy(file)
    *keys, last = path.split(".")
    inner = file
    for key in keys:
        inner = inner[key]
    inner[last] = value
    return file


NFKC = {"type": "NFKC"}
LOWER = {"type": "Sequence", "normalizers": [NFKC, {"type": "Lowercase"}]}
ADDS = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}


@pytest.mark.parametrize(
    ("base", "path", "value", "expected"),
    [
        ("byte", "model", {"type": "WordPiece", "vocab": {"a": 0}}, "its model is WordPiece"),
        ("byte", "model", {"type": "Unigram", "vocab": [["a", 0.0]]}, "its model is Unigram"),
        ("byte", "model.dropout", 0.1, "its model has dropout"),
        ("byte", "model.end_of_word_suffix", "</w>", "its model has end_of_word_suffix"),
        ("byte", "normalizer", NFKC, "the normaliser NFKC changes text"),
        ("byte", "normalizer", LOWER, "the normaliser NFKC changes text"),
        ("byte", "pre_tokenizer", {"type": "Whitespace"}, "last pre-tokeniser is not"),
        ("byte", "pre_tokenizer", ADDS, "adds a space"),
        ("byte", "pre_tokenizer.pretokenizers", [SPLIT, {"type": "ByteLevel"}], "removes text"),
        ("byte", "decoder", {"type": "WordPiece"}, "its decoder is WordPiece"),
        ("byte", "decoder", None, "its decoder is none"),
        ("spaced", "decoder", {"type": "BPEDecoder"}, "its decoder is BPEDecoder"),
        ("spaced", "normalizer", LOWER, "the normaliser NFKC changes text"),
        ("spaced", "normalizer", None, "a space by U"),
        ("spaced", "normalizer", doubled({})["normalizer"], "doubles the space before a text"),
        ("spaced", "pre_tokenizer", {"type": "Whitespace"}, "the pre-tokeniser Whitespace"),
        ("spaced", "pre_tokenizer", {"type": "Metaspace", "replacement": "_"}, "something else"),
        ("spaced", "model.byte_fallback", False, "it has no byte fallback"),
        ("spaced", "model.ignore_merges", True, "ignore_merges"),
        ("spaced", "model.vocab", {"a": 0}, "256 of 256 bytes have no token"),
        ("spaced", "model.vocab", {"a": 0, "b": 0}, "two of its pieces have one id"),
        ("spaced", "model.merges", [["a", "nothing"]], "cannot read it"),
        ("spaced", "added_tokens", [added("<s>", 7)], "'<s>' has the id 7, but 1 elsewhere"),
        ("spaced", "added_tokens", [added("<z>", 7)], "'<z>' has the id 7, which belongs to"),
        ("spaced", "added_tokens", [{"id": 3}], "not a tokenizer.json"),
        ("spaced", "added_tokens", 3, "not a tokenizer.json"),
        ("spaced", "model.vocab", {"a": "b"}, "not a tokenizer.json"),
        ("spaced", "model.vocab", {"a": -1}, "not a tokenizer.json"),
        ("spaced", "model.vocab", {"a": 1 << 40}, "not a tokenizer.json"),
        ("spaced", "decoder", {"kind": 1}, "not a tokenizer.json"),
        ("spaced", "decoder", "Metaspace", "not a tokenizer.json"),
        ("byte", "model", {"type": "BPE", "vocab": {"a": 0}}, "not a tokenizer.json"),
        ("spaced", "model.merges", None, "not a tokenizer.json"),
        ("spaced", "model.merges", [5], "not a tokenizer.json"),
        ("spaced", "model.merges", ["a b c"], "not a tokenizer.json"),
        ("spaced", "model.unk_token", ["x"], "not a tokenizer.json"),
    ],
)  # fmt: skip
def test_what_does_not_give_text_back_is_refused_by_name(
    byte_json, spm_json, base, path, value, expected
):
    file = changed({"byte": byte_json, "spaced": spm_json}[base], path, value)
    with pytest.raises(UserError, match=f"^here: .*{expected}") as e:
        HuggingFaceTokenizer(file, "here")
    assert "\n" not in str(e.value)


def test_a_file_without_ends_is_an_error(byte_json):
    file = byte_json | {"added_tokens": byte_json["added_tokens"][2:]}
    with pytest.raises(UserError, match=r"^here: bos_token: the file has none"):
        HuggingFaceTokenizer(file, "here")
    with pytest.raises(UserError, match=r"eos_token '</s>' is not in the vocabulary"):
        HuggingFaceTokenizer(byte_json, "here", eos_token="</s>")
