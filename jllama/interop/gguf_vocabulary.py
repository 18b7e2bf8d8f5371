"""The tables of a tokenizer in a GGUF file, from which llama.cpp encodes and decodes.

Three of llama.cpp's algorithms are used: "llama" (SentencePiece's BPE, with bytes for characters
that have no piece), "t5" (SentencePiece's unigram) and "gpt2" (byte-level BPE; "pre" names the
pattern that cuts words). A tokenizer whose ids they would not give is refused, or the difference is
listed in docs/gguf.md.
"""

import dataclasses
from collections.abc import Mapping

import gguf
from gguf import TokenType

from jllama.errors import UserError
from jllama.progress import note
from jllama.text.interface import SPACE
from jllama.text.llama3 import PATTERN
from jllama.text.sentencepiece_model import parse_sentencepiece
from jllama.text.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)
from jllama.text.tokenizer_json import BYTE_TOKENS, TokenizerJson, spell

_OTHERWISE = "convert with --tokenizer none for a file that takes ids, or with --tokenizer PATH"
_NO_SCORE = -1000.0  # the score of a token that no merge makes, as in llama.cpp's converter


@dataclasses.dataclass
class Vocabulary:
    """The tokenizer part of a GGUF file; model "gpt2" uses `merges`, "llama" and "t5" `scores`.

    Model "no_vocab" has nothing: programs then give llama.cpp ids.
    """

    model: str
    ids: dict[str, int]  # by role: "bos", "eos", "unk", "pad", "eot", "eom"
    adds_bos: bool = True
    adds_eos: bool = False
    merges: list[str] = dataclasses.field(default_factory=list)
    space_prefix: bool = False
    charsmap: bytes = b""
    remove_extra_whitespaces: bool = False
    tokens: list[str] = dataclasses.field(default_factory=list)
    types: list[TokenType] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Adds the metadata."""
        writer.add_tokenizer_model(self.model)
        if self.model == "no_vocab":
            return
        writer.add_tokenizer_pre("llama-bpe" if self.model == "gpt2" else "default")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        for role, id in self.ids.items():
            getattr(writer, f"add_{role}_token_id")(id)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_prefix)
        if self.charsmap or self.remove_extra_whitespaces or self.model == "t5":
            writer.add_remove_extra_whitespaces(self.remove_extra_whitespaces)
            writer.add_precompiled_charsmap(self.charsmap)

    def cut(self, rows: int) -> None:
        """Drops the tokens that have no row."""
        lost = ", ".join(self.tokens[rows : rows + 5])
        note(
            f"gguf: {len(self.tokens) - rows} tokens that have no row in the model are left out:"
            f" {lost}"
        )
        for column in (self.tokens, self.types, self.scores):
            del column[rows:]
        self.ids = {role: id for role, id in self.ids.items() if id < rows}

    def put(self, id: int, token: str, type: TokenType, score: float | None = None) -> None:
        """Sets the token of `id`, and its score if given; lower ids without a token are unused."""
        for row in range(len(self.tokens), id + 1):
            self.tokens.append(f"[PAD{row}]")
            self.types.append(TokenType.UNUSED)
            self.scores.append(_NO_SCORE)
        self.tokens[id], self.types[id] = token, type
        if score is not None:
            self.scores[id] = score


def vocabulary_of(tokenizer: Tokenizer | None, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer, filled up with unused tokens to `rows`, the embedding's.

    Tokens that have no row are left out, which a line on stderr says, and one says that llama.cpp
    will not normalise a text where the tokenizer does. Raises UserError if llama.cpp would give
    other ids to every text.
    """
    match tokenizer:
        case None:
            return Vocabulary("no_vocab", ids={})
        case SentencePieceTokenizer():
            vocabulary = _sentencepiece(tokenizer)
        case TiktokenTokenizer():
            vocabulary = _tiktoken(tokenizer)
        case HuggingFaceTokenizer():
            vocabulary = _huggingface(tokenizer)
        case _:
            raise TypeError(tokenizer)
    vocabulary.adds_bos, vocabulary.adds_eos = tokenizer.adds_bos, tokenizer.adds_eos
    for token, id in tokenizer.special_tokens.items():
        if id >= len(vocabulary.tokens) or vocabulary.types[id] != TokenType.UNKNOWN:
            vocabulary.put(id, token, TokenType.CONTROL)
    size = len(vocabulary.tokens)
    if size > rows:
        if tokenizer.text_size > rows:
            raise UserError(
                f"gguf: the tokenizer has {size} tokens, and the model {rows} rows: {_OTHERWISE}"
            )
        vocabulary.cut(rows)
    for row in range(size, rows):
        vocabulary.put(row, f"[PAD{row}]", TokenType.UNUSED)
    return vocabulary


# ---------------------------------------------------------------------------------- SentencePiece


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> Vocabulary:
    model = parse_sentencepiece(tokenizer.model)
    types = [TokenType(piece.type) for piece in model.pieces]  # the numbers are the same
    algorithm = {"unigram": "t5", "bpe": "llama"}.get(model.algorithm)
    if algorithm is None:
        raise _cannot("a SentencePiece model that is neither BPE nor unigram")
    if not model.marks_before:
        raise _cannot("spaces that are not marked before the word")
    if algorithm == "llama" and (model.charsmap or model.remove_extra_whitespaces):
        what = "normalises characters" if model.charsmap else "removes spaces at the ends of a text"
        note(
            f"gguf: the tokenizer {what}, and llama.cpp does not before BPE: texts that this would"
            " change get other ids there"
        )
    if algorithm == "llama" and TokenType.BYTE not in types:
        raise _cannot("BPE without a piece for every byte")
    vocabulary = Vocabulary(
        algorithm,
        _ids(tokenizer, types.index(TokenType.UNKNOWN), model.pad_id),
        space_prefix=model.add_dummy_prefix,
        charsmap=model.charsmap,
        remove_extra_whitespaces=model.remove_extra_whitespaces,
    )
    for id, (piece, type) in enumerate(zip(model.pieces, types, strict=True)):
        text = piece.text
        if type == TokenType.USER_DEFINED:  # llama.cpp finds it before it marks spaces
            text = text.replace(SPACE, " ")
        vocabulary.put(id, text, type, piece.score)
    for text, id in tokenizer.added_tokens.items():
        vocabulary.put(id, text, TokenType.USER_DEFINED)
    return vocabulary


# ---------------------------------------------------------------------------------- BPE of bytes


def _tiktoken(tokenizer: TiktokenTokenizer) -> Vocabulary:
    vocabulary = Vocabulary("gpt2", merges=_merges(tokenizer.ranks), ids=_ids(tokenizer))
    for piece, rank in tokenizer.ranks.items():
        vocabulary.put(rank, spell(piece), TokenType.NORMAL)
    return vocabulary


def _merges(ranks: Mapping[bytes, int]) -> list[str]:
    """Every pair of pieces that makes a piece, in the order of the rank of that piece.

    tiktoken merges any neighbours that make a piece, not only the pair from which it was trained.
    """
    merges = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += [f"{spell(a)} {spell(b)}" for _, _, a, b in sorted(pairs)]
    return merges


# -------------------------------------------------------------------------------- tokenizer.json


def _huggingface(tokenizer: HuggingFaceTokenizer) -> Vocabulary:
    file = TokenizerJson(tokenizer.json, "gguf")
    cut, merges = tokenizer.json.get("pre_tokenizer"), file.merges
    if file.byte_level:
        _check_cut(cut)
        vocabulary = Vocabulary("gpt2", merges=[f"{a} {b}" for a, b in merges], ids=_ids(tokenizer))
        for piece, id in file.vocab.items():
            vocabulary.put(id, piece, TokenType.NORMAL)
    else:
        if cut and cut.get("split", True):
            raise _cannot("words that are cut before BPE")
        unk = file.vocab.get(file.unk)
        prefix = file.prefix != "never"
        vocabulary = Vocabulary("llama", ids=_ids(tokenizer, unk=unk), space_prefix=prefix)
        for piece, id in file.vocab.items():
            vocabulary.put(id, piece, TokenType.BYTE if piece in BYTE_TOKENS else TokenType.NORMAL)
        # llama.cpp merges the neighbours whose piece has the highest score.
        for rank, (a, b) in reversed(list(enumerate(merges))):
            vocabulary.scores[file.vocab[a + b]] = -float(rank)
        if unk is not None:
            vocabulary.types[unk] = TokenType.UNKNOWN
    for token in tokenizer.added:
        if token.special:
            continue
        if not token.plain:
            raise _cannot(f"the added token {token.text!r}, which depends on what is beside it")
        vocabulary.put(token.id, token.text, TokenType.USER_DEFINED)
    return vocabulary


def _check_cut(cut: Mapping | None) -> None:
    """Raises UserError unless words are cut as in Llama 3."""
    match cut:
        case {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"} as split,
            {"type": "ByteLevel", "use_regex": False},
        ]} if not split.get("invert") and pattern == PATTERN:  # fmt: skip
            return
    raise _cannot("words that are cut by a pattern other than Llama 3's")


# ----------------------------------------------------------------------------- all tokenizers


def _ids(tokenizer: Tokenizer, unk: int | None = None, pad: int | None = None) -> dict[str, int]:
    """Special ids by role. llama.cpp ends a generated text at "eos", "eot" and "eom"."""
    named = tokenizer.special_tokens.get
    stops = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    roles = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "unk": unk,
        "pad": named(tokenizer.carried.get("pad_token", "<|finetune_right_pad_id|>"), pad),
        "eot": named("<|eot_id|>", stops[0] if stops else None),
        "eom": named("<|eom_id|>"),
    }
    return {role: id for role, id in roles.items() if id is not None}


def _cannot(what: str) -> UserError:
    return UserError(
        f"gguf: the tokenizer has {what}; llama.cpp would give other ids: {_OTHERWISE}"
    )
