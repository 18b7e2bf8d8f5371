"""A tokenizer as GGUF has it: llama.cpp encodes and decodes by these tables with code of its own.

That code knows three algorithms that matter here: "llama" (SentencePiece's BPE with bytes for what
has no piece), "t5" (SentencePiece's unigram) and "gpt2" (BPE of bytes; `pre` names the rule that
cuts the text first). What they cannot say is a UserError: a file that tokenises otherwise than the
model was trained looks whole and is not.
"""

import dataclasses
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import gguf
from gguf import TokenType

from jllama.errors import UserError
from jllama.text.huggingface import HuggingFaceTokenizer
from jllama.text.interface import Tokenizer
from jllama.text.llama3 import PATTERN, TiktokenTokenizer
from jllama.text.spm import SPACE, SentencePieceTokenizer

_ADDED_SCORE = -1000.0  # of a token that no merge makes; llama.cpp's converter gives it too


@dataclasses.dataclass
class Vocabulary:
    """What goes into a GGUF file. `scores` is empty for "gpt2", which goes by `merges`."""

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    ids: dict[str, int]  # "bos", "eos", "unk", "pad", "eot", "eom"
    space_prefix: bool = False
    charsmap: bytes = b""
    remove_extra_whitespaces: bool = False

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Adds the metadata; a text gets BOS, as it does in `jllama.load(...).generate`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre("llama-bpe" if self.model == "gpt2" else "default")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_scores(self.scores)
        writer.add_token_merges(self.merges)
        for role, id in self.ids.items():
            getattr(writer, f"add_{role}_token_id")(id)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        if self.model != "gpt2":
            writer.add_add_space_prefix(self.space_prefix)
        if self.model == "t5":
            writer.add_remove_extra_whitespaces(self.remove_extra_whitespaces)
            writer.add_precompiled_charsmap(self.charsmap)

    def put(self, id: int, token: str, type: TokenType) -> None:
        """Adds a token at `id`, or changes the one that is there."""
        self._grow(id + 1)
        self.tokens[id], self.types[id] = token, type

    def _grow(self, rows: int) -> None:
        for id in range(len(self.tokens), rows):
            self.tokens.append(f"[PAD{id}]")
            self.types.append(TokenType.UNUSED)
            if self.model != "gpt2":
                self.scores.append(_ADDED_SCORE)


def vocabulary_of(tokenizer: Tokenizer | None, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer of `jllama.text`, with `rows` tokens: as many as the embedding.

    Raises UserError if there is no tokenizer, it has more tokens, or llama.cpp would tokenise
    otherwise.
    """
    match tokenizer:
        case None:
            raise UserError(
                "gguf: the model has no tokenizer, and llama.cpp loads no text model"
                " without one; put tokenizer.model or tokenizer.json beside it"
            )
        case SentencePieceTokenizer():
            made = _sentencepiece(tokenizer)
        case TiktokenTokenizer():
            made = _tiktoken(tokenizer)
        case HuggingFaceTokenizer():
            made = _huggingface(tokenizer)
    if len(made.tokens) > rows:
        raise UserError(
            f"gguf: the tokenizer has {len(made.tokens)} tokens and the model {rows} rows"
        )
    made._grow(rows)
    return made


# ---------------------------------------------------------------------------------- SentencePiece


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> Vocabulary:
    # The fields of sentencepiece_model.proto, by their numbers there, and their defaults.
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(tokenizer.model):
        match number:
            case 1:
                pieces.append({2: b"\0\0\0\0", 3: TokenType.NORMAL, **dict(_fields(value))})
            case 2:
                trainer = dict(_fields(value))
            case 3:
                normalizer = dict(_fields(value))
    kind = {1: "t5", 2: "llama"}.get(trainer.get(3, 1))
    charsmap, remove_extra = normalizer.get(2, b""), bool(normalizer.get(4, 1))
    if kind is None:
        raise _cannot("pieces that are neither BPE's nor unigram's")
    if not normalizer.get(5, 1) or trainer.get(24, 0):
        raise _cannot("spaces that are not marked before the word")
    if kind == "llama" and (charsmap or remove_extra):
        raise _cannot("BPE after a normalisation that changes the text")
    made = Vocabulary(
        model=kind,
        tokens=[piece[1].decode() for piece in pieces],
        types=[TokenType(piece[3]) for piece in pieces],
        scores=[struct.unpack("<f", piece[2])[0] for piece in pieces],
        merges=[],
        ids=_ids(tokenizer, unk=trainer.get(40, 0), pad=trainer.get(43, -1)),
        space_prefix=bool(normalizer.get(3, 1)),
        charsmap=charsmap,
        remove_extra_whitespaces=remove_extra,
    )
    if kind == "llama" and TokenType.BYTE not in made.types:
        raise _cannot("BPE without a piece for every byte")
    for id, (token, type) in enumerate(zip(made.tokens, made.types, strict=True)):
        if type == TokenType.USER_DEFINED:  # looked for in the text before its spaces are marked
            made.tokens[id] = token.replace(SPACE, " ")
    _add(made, tokenizer.added_tokens, tokenizer.special_tokens)
    return made


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protobuf message's fields: int, or bytes of whatever they are.

    The generated module of the sentencepiece package asks for a newer protobuf than others allow.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value - (1 << 64) if value >= 1 << 63 else value

    while at < len(message):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        yield key >> 3, message[at : at + size]
        at += size


# ------------------------------------------------------------------------------------ BPE of bytes


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's character for each byte: its own where that can be printed, else one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _written(token: bytes) -> str:
    return "".join([_ALPHABET[b] for b in token])


def _tiktoken(tokenizer: TiktokenTokenizer) -> Vocabulary:
    ranks = tokenizer.ranks
    made = Vocabulary("gpt2", [], [], [], _merges(ranks), _ids(tokenizer))
    for token, rank in ranks.items():
        made.put(rank, _written(token), TokenType.NORMAL)
    _add(made, tokenizer.special_tokens, tokenizer.special_tokens)
    return made


def _merges(ranks: Mapping[bytes, int]) -> list[str]:
    """Every pair of tokens that makes a token, by the rank of what it makes.

    tiktoken merges whichever neighbours make a token, not only the pair that first made it.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += [f"{_written(a)} {_written(b)}" for _, _, a, b in sorted(pairs)]
    return merges


# ---------------------------------------------------------------------------------- tokenizer.json


def _huggingface(tokenizer: HuggingFaceTokenizer) -> Vocabulary:
    model = tokenizer.json["model"]
    if model.get("type", "BPE") != "BPE":
        raise _cannot(f"a model of type {model['type']}")
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            raise _cannot(f"BPE with {option}")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    steps = _steps(tokenizer.json.get("pre_tokenizer"), "pretokenizers")
    normalizers = _steps(tokenizer.json.get("normalizer"), "normalizers")
    if any(step["type"] == "ByteLevel" for step in steps):
        made = _of_bytes(tokenizer, model["vocab"], merges, steps, normalizers)
    else:
        made = _of_pieces(tokenizer, model, merges, steps, normalizers)
    added = {t["content"]: t["id"] for t in tokenizer.json.get("added_tokens", ())}
    _add(made, added, tokenizer.special_tokens)
    if (unk := made.ids.get("unk")) is not None:
        made.types[unk] = TokenType.UNKNOWN
    return made


def _steps(step: Mapping | None, many: str) -> list[Mapping]:
    if step is None:
        return []
    return list(step[many]) if step["type"] == "Sequence" else [step]


def _of_bytes(tokenizer, vocab, merges, steps, normalizers) -> Vocabulary:
    for step in normalizers:
        raise _cannot(f"the normalizer {step['type']} before a BPE of bytes")
    match steps:
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"} as split,
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if not split.get("invert"):
            if pattern != PATTERN:
                raise _cannot(f"text cut by another rule than Llama 3's: {pattern}")
        case _:
            raise _cannot("text cut by another rule than Llama 3's")
    written = [f"{a} {b}" for a, b in merges]
    made = Vocabulary("gpt2", [], [], [], written, _ids(tokenizer))
    for token, id in vocab.items():
        made.put(id, token, TokenType.NORMAL)
    return made


def _of_pieces(tokenizer, model, merges, steps, normalizers) -> Vocabulary:
    if not model.get("byte_fallback"):
        raise _cannot("BPE without a piece for every byte")
    prefix = False
    for step in normalizers:
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                pass
            case _:
                raise _cannot(f"the normalizer {step['type']}")
    for step in steps:
        match step:
            case {"type": "Metaspace", "replacement": "\u2581", "split": False}:
                prefix = step.get("prepend_scheme", "always") != "never"
            case _:
                raise _cannot(f"the pre-tokenizer {step['type']}")
    vocab = model["vocab"]
    made = Vocabulary("llama", [], [], [], [], _ids(tokenizer, unk=vocab.get(model["unk_token"])))
    made.space_prefix = prefix
    for token, id in vocab.items():
        byte = _BYTE.fullmatch(token) is not None
        made.put(id, token, TokenType.BYTE if byte else TokenType.NORMAL)
    # llama.cpp merges the neighbours that make the token of the highest score.
    for rank, (a, b) in reversed(list(enumerate(merges))):
        made.scores[vocab[a + b]] = -float(rank)
    return made


_BYTE = re.compile("<0x[0-9A-F]{2}>")


# --------------------------------------------------------------------------------------- for all


def _ids(tokenizer: Tokenizer, unk: int | None = None, pad: int | None = None) -> dict[str, int]:
    """Ids by their roles; end of turn and of message so that llama.cpp stops at them as well."""
    named = tokenizer.special_tokens.get
    others = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    roles = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "unk": unk,
        "pad": named("<|finetune_right_pad_id|>", pad),
        "eot": named("<|eot_id|>", others[0] if others else None),
        "eom": named("<|eom_id|>"),
    }
    return {role: id for role, id in roles.items() if id is not None and id >= 0}


def _add(made: Vocabulary, added: Mapping[str, int], special: Iterable[str]) -> None:
    """Tokens that are looked for in the text as they are; the special ones only when asked."""
    special = set(special)
    for token, id in added.items():
        made.put(id, token, TokenType.CONTROL if token in special else TokenType.USER_DEFINED)


def _cannot(what: str) -> UserError:
    return UserError(f"gguf: the tokenizer has {what}; llama.cpp would tokenise otherwise")
