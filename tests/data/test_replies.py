"""Instruction tuning at read time: replies are predicted, prompts are not."""

import numpy as np
import pytest

from jllama.config import PrepareConfig, ReplyObjective, TrainedTokenizer
from jllama.data.dataset import Dataset
from jllama.data.pack import WholeRows
from jllama.data.prepare import prepare
from jllama.data.rewrite import Replies
from jllama.errors import UserError
from jllama.text.spm import SentencePieceTokenizer
from jllama.text.vocabulary import train_sentencepiece

MARKER = "### Response:"
PAIRS = [(f"### Instruction:\nSay {n} twice.\n\n{MARKER}", f"{n} {n}") for n in range(40)]
PLAIN = "a text without a marker"


@pytest.fixture(scope="module")
def tokenizer():
    texts = [a + b for a, b in PAIRS] + [PLAIN]
    return train_sentencepiece(texts * 20, TrainedTokenizer(kind="train", vocab_size=310))


@pytest.fixture
def prepared(tmp_path, tokenizer, write_jsonl):
    config = PrepareConfig(folder=str(tmp_path / "prepared"), workers=1, shards=2)
    texts = [a + b for a, b in PAIRS] + [PLAIN]
    return prepare(write_jsonl(texts), tokenizer, config)


def test_what_a_model_is_given_is_not_predicted_and_what_it_replies_is(prepared, tokenizer):
    replies = Replies(ReplyObjective(kind="reply"), tokenizer, seed=0)
    rows = WholeRows(prepared, 150, "error", replies.gain)
    seen = {}
    for i in range(len(rows)):
        row = replies(rows[i], epoch=i)
        for n in range(1, row["segments"].max() + 1):
            inside = row["segments"] == n
            tokens, weights = row["tokens"][inside].tolist(), row["weights"][inside]
            given = len(tokens) - np.count_nonzero(weights)
            assert not weights[:given].any() and weights[given:].all()
            seen[tokenizer.decode(tokens)] = tokens[:given], tokens[given:]
    assert len(seen) == len(PAIRS) + 1
    for prompt, reply in PAIRS:
        given, predicted = seen[prompt + reply]
        # Generation begins with exactly these ids; no space is added before the reply.
        assert given == tokenizer.encode(prompt, bos=True)
        assert predicted[-1] == tokenizer.eos_id
        text = tokenizer.stream(after=given)
        assert "".join(map(text.feed, predicted[:-1])) + text.end() == reply
    given, predicted = seen[PLAIN]
    assert given == [tokenizer.bos_id]
    assert replies.report().startswith(
        f"replies, predicted after their prompt: {len(PAIRS)} of {len(PAIRS) + 1} documents"
    )


def test_a_tokenizer_that_adds_no_bos_begins_documents_and_prompts_without(
    tokenizer, tmp_path, write_jsonl
):
    bare = SentencePieceTokenizer(tokenizer.model, adds_bos=False)
    config = PrepareConfig(folder=str(tmp_path / "prepared"), workers=1)
    source = write_jsonl([a + b for a, b in PAIRS])
    prepared = prepare(source, bare, config)
    assert prepared.folder != prepare(source, tokenizer, config).folder
    tokens, _ = prepared.read(0, prepared.tokens)
    assert tokenizer.bos_id not in tokens and np.count_nonzero(tokens == bare.eos_id) == len(PAIRS)
    replies = Replies(ReplyObjective(kind="reply"), bare, seed=0)
    row = replies(WholeRows(prepared, 150, "error", replies.gain)[0], epoch=0)
    first = row["segments"] == 1
    given = row["tokens"][first & (row["weights"] == 0)].tolist()
    assert given in [bare.encode(prompt) for prompt, _ in PAIRS]


def test_a_cut_document_is_predicted_after_its_marker_and_without_one_not_at_all(
    prepared, tokenizer
):
    replies = Replies(ReplyObjective(kind="reply"), tokenizer, seed=0)
    whole = [tokenizer.encode(a + b, bos=True, eos=True) for a, b in PAIRS]
    for length in range(5, max(map(len, whole)) - 2):
        rows = WholeRows(prepared, length, "cut", replies.gain)
        made = [replies(rows[i], epoch=0) for i in range(len(rows))]
        for row in made:
            for n in range(1, row["segments"].max() + 1):
                tokens, weights = (row[key][row["segments"] == n] for key in ("tokens", "weights"))
                given = tokenizer.decode(tokens[weights == 0].tolist())
                text = tokenizer.decode(tokens.tolist())
                if MARKER in text:
                    prompt, _, reply = text.partition(MARKER)
                    assert given == prompt + MARKER
                    (pair,) = [b for a, b in PAIRS if a == given]
                    assert pair.startswith(reply)
                    assert (tokens[-1] == tokenizer.eos_id) <= (pair == reply)
                elif text != PLAIN:
                    assert not weights.any()


def test_a_letter_that_is_cut_in_its_bytes_is_not_predicted(tokenizer, tmp_path, write_jsonl):
    text = f"a{MARKER} été"
    prepared = prepare(
        write_jsonl([text]), tokenizer, PrepareConfig(folder=str(tmp_path / "p"), workers=1)
    )
    replies = Replies(ReplyObjective(kind="reply"), tokenizer, seed=0)
    ids = tokenizer.encode(text, bos=True, eos=True)
    for length in range(len(ids) - 6, len(ids) - 1):
        row = replies(WholeRows(prepared, length, "cut")[0], epoch=0)
        assert text.startswith(tokenizer.decode(row["tokens"].tolist()))


def test_a_document_with_a_second_marker_is_refused_and_named_unless_it_is_meant(
    tokenizer, tmp_path, write_jsonl
):
    texts = [a + b for a, b in PAIRS]
    texts[8] += f"\n\n### Instruction:\nAgain.\n\n{MARKER}8"
    texts[30] += MARKER
    config = PrepareConfig(folder=str(tmp_path / "p"), workers=1, shards=3)
    rows = WholeRows(prepare(write_jsonl(texts, "chat"), tokenizer, config), 200, "error", 2)
    strict = Replies(ReplyObjective(kind="reply"), tokenizer, seed=0)
    said = (
        r"source chat: document 9, '### Instruction:.*'\.\.\., has '### Response:' 2 times \(2 such"
    )
    for held_out in (False, True):
        with pytest.raises(UserError, match=said) as e:
            strict.check("chat", rows, held_out)
    assert str(e.value).count("\n") == 0 and "data.objective.second_marker=predict" in str(e.value)
    Replies(ReplyObjective(kind="reply", second_marker="predict"), tokenizer, 0).check("chat", rows)


def test_rows_without_replies_are_refused(prepared, tokenizer):
    rows = WholeRows(prepared, 150, "error", 2)
    with pytest.raises(
        UserError, match=r"data\.objective\.after='NOPE': does not appear in the documents"
    ):
        Replies(ReplyObjective(kind="reply", after="NOPE"), tokenizer, seed=0).check("a", rows)
    # Held-out text may be plain; and a source is, if that is meant and another has the marker.
    strict = Replies(ReplyObjective(kind="reply", after="NOPE"), tokenizer, seed=0)
    assert not strict.check("a", rows, held_out=True)
    plain = ReplyObjective(kind="reply", after="NOPE", no_marker="predict")
    assert not Replies(plain, tokenizer, seed=0).check("a", rows)
    assert Replies(ReplyObjective(kind="reply", no_marker="predict"), tokenizer, 0).check("a", rows)


def test_a_document_without_the_marker_is_refused_and_named_unless_it_is_meant(prepared, tokenizer):
    rows = WholeRows(prepared, 150, "error", 2)
    said = rf"source a: document 41, '{PLAIN}'\.\.\., lacks '### Response:' \(1 such documents\)"
    for held_out in (False, True):
        with pytest.raises(UserError, match=said) as e:
            Replies(ReplyObjective(kind="reply"), tokenizer, seed=0).check("a", rows, held_out)
    assert "set data.objective.no_marker=predict" in str(e.value)
    for second in ("error", "predict"):
        meant = ReplyObjective(kind="reply", no_marker="predict", second_marker=second)
        assert Replies(meant, tokenizer, seed=0).check("a", rows)
    # Cut off before its marker, a document is no such one.
    prompts = WholeRows(prepared, 5, "cut")
    with pytest.raises(UserError, match="does not appear"):
        Replies(ReplyObjective(kind="reply"), tokenizer, seed=0).check("a", prompts)


def test_batches_are_a_function_of_their_step(prepared, tokenizer):
    replies = Replies(ReplyObjective(kind="reply"), tokenizer, seed=0)
    data = Dataset({"a": WholeRows(prepared, 150, "error", 2)}, {"a": 1.0}, 2, 3, replies)
    first = [data.batch(t) for t in range(4)]
    again = data.batch(2)
    assert all((first[2][key] == again[key]).all() for key in again)
