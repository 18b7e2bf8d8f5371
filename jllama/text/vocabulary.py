"""Trains a SentencePiece BPE vocabulary whose decoding gives every text back exactly.

SentencePiece's own training never makes a piece of a newline and the indentation after it, though
code has one every few words. So this module cuts the text into words with a regular expression, and
gives SentencePiece each distinct word once, with its count. The commonest line breaks with
indentation become pieces of their own.
"""

import re
from collections import Counter
from collections.abc import Iterable
from io import BytesIO

import sentencepiece

from jllama.config import LEAST_PIECES, TrainedTokenizer
from jllama.errors import UserError
from jllama.files import storage
from jllama.text.infill import PIECES
from jllama.text.spm import SentencePieceTokenizer

_RESERVED = 3 + 256  # <unk>, <s>, </s> and one piece per byte
_BREAK = re.compile(r"((?:\r?\n)+[ \t]*)")
# A word includes the space before it. Its length is bounded, so that a long blob is many words.
_WORD = re.compile(r" ?[^\W\d]{1,64}|\d| ?[^\s\w]{1,64}| +(?= )| |[^\S ]+|\w")
_LINE = re.compile(r".{1,256}", re.DOTALL)
_BREAK_SHARE = 1 / 500  # of all breaks; one that is as common as this is a piece
_MAX_BREAKS = 32


def train_sentencepiece(
    texts: Iterable[str], config: TrainedTokenizer, size_key: str = "tokenizer.vocab_size"
) -> SentencePieceTokenizer:
    """Trains on the first `config.max_bytes` of `texts`; equal texts give equal vocabularies.

    It has byte fallback and single digits, and neither normalises nor adds a space before a text.
    Raises UserError if there is no text, or too little for `config.vocab_size` pieces, which the
    error calls `size_key`.
    """
    lines, breaks = _count(texts, config.max_bytes)
    if not lines and not breaks:
        raise UserError("tokenizer: no text to train on; give files with text")
    control = [*PIECES] if config.infill else []
    free = config.vocab_size - _RESERVED - len(control)
    most = min(_MAX_BREAKS, free // 8)
    common = [b for b, n in breaks.most_common(most) if n >= _BREAK_SHARE * breaks.total()]
    common = sorted({"\n", *common})
    letters = _letters(lines, free - len(common))
    words = _words(lines, letters, _LINE if config.cross_words else _WORD)
    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{word}\t{n}" for word, n in words.items()),
            model_writer=model,
            input_format="tsv",
            model_type="bpe",
            vocab_size=config.vocab_size,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            # The text is cut into words already.
            split_by_whitespace=False,
            split_by_unicode_script=False,
            control_symbols=control,
            user_defined_symbols=[b.replace(" ", "\u2581") for b in common],
            max_sentencepiece_length=32,
            max_sentence_length=1 << 16,
            num_threads=1,
            minloglevel=3,
        )
    except (RuntimeError, ValueError) as e:
        limit = re.search(r"value <= (\d+)", str(e))
        if limit is None:
            raise UserError(
                f"tokenizer: SentencePiece cannot train on this text: {storage.one_line(e)}"
            ) from None
        fix = "give more text"
        if int(limit[1]) >= LEAST_PIECES:
            fix = f"lower it to that number, or {fix}"
        raise UserError(
            f"{size_key}={config.vocab_size}: the text gives only {limit[1]} pieces; {fix}"
        ) from None
    return SentencePieceTokenizer(model.getvalue())


def _count(texts: Iterable[str], max_bytes: int) -> tuple[Counter, Counter]:
    """Counts the distinct lines, and the distinct breaks with indentation between them."""
    lines, breaks = Counter(), Counter()
    left = max_bytes
    for text in texts:
        parts = _BREAK.split(text[:left])
        lines.update(parts[::2])
        breaks.update(parts[1::2])
        left -= len(text.encode("utf-8", "replace"))
        if left <= 0:
            break
    del lines[""]
    return lines, breaks


def _words(lines: Counter, letters: frozenset[str], pattern: re.Pattern) -> Counter:
    """Counts the distinct words; the text is cut at every character that is not in `letters`."""
    others = re.compile(f"[^{re.escape(''.join(sorted(letters)))}]+")
    words = Counter()
    for line, n in lines.items():
        for part in others.split(line):
            for word in pattern.findall(part):
                words[word] += n
    return words


def _letters(lines: Counter, room: int) -> frozenset[str]:
    """Returns the characters that get a piece each: 99.99% of the text, in at most half the room.

    The others are encoded in bytes, and so are NUL and tab, which SentencePiece cannot train on.
    """
    counts = Counter()
    for line, n in lines.items():
        for letter in line:
            counts[letter] += n
    del counts["\t"], counts["\0"]
    letters, covered, enough = [], 0, 0.9999 * counts.total()
    for letter, n in counts.most_common(max(1, room // 2)):
        if covered >= enough:
            break
        letters.append(letter)
        covered += n
    return frozenset(letters)
