"""Reads and checks a tokenizer.json, which holds byte pair encoding of one of two families.

Byte-level (Llama 3): a pattern cuts the text into words, and a piece is any bytes, spelt in
printable letters. SentencePiece-like (Llama 2): a piece is text with U+2581 for a space, and byte
tokens spell the text that no piece covers. Any other file is refused with the reason, because
decoding would not give the text back.
"""

import json
from typing import Any, NoReturn

import tokenizers

from jllama.errors import UserError
from jllama.files import storage
from jllama.text.added import MAX_VOCAB_SIZE, AddedToken
from jllama.text.interface import SPACE, Prefix

BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


def _letters() -> dict[str, int]:
    """Returns GPT-2's letter for each byte: itself if it is printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


LETTERS = _letters()
# From 5.24 on transformers makes up with this normaliser for a Metaspace of `tokenizers`, which
# mistakes a text's first space for the one that it would add. The encoder here never does.
_DOUBLE = {"type": "Replace", "pattern": {"Regex": rf"\A{SPACE}"}, "content": 2 * SPACE}
_LETTER = {byte: letter for letter, byte in LETTERS.items()}


def spell(piece: bytes) -> str:
    """Spells a byte-level piece as in a tokenizer.json."""
    return "".join([_LETTER[byte] for byte in piece])


def token_ids(file: Any, where: str) -> dict[str, int]:
    """Returns text -> id of every token of a tokenizer.json of any kind.

    Raises UserError if it is not a tokenizer.json.
    """
    try:
        vocab = file["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram: pieces with their scores
            vocab = {piece: id for id, (piece, _) in enumerate(vocab)}
        added = {token["content"]: token["id"] for token in file.get("added_tokens") or ()}
        vocab = vocab | added
        if not all(type(id) is int and 0 <= id < MAX_VOCAB_SIZE for id in vocab.values()):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{where}: not a tokenizer.json: it has no vocabulary") from None
    return vocab


def affixes(file: dict, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tokens that a tokenizer.json's post-processor adds before a text, and after it.

    Raises UserError for a post-processor that does anything else.
    """
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    try:
        for step in _flat(file.get("post_processor"), "processors"):
            match step["type"]:
                case "ByteLevel":  # changes offsets only
                    pass
                case "BertProcessing" | "RobertaProcessing":
                    before, after = (step["cls"][0], *before), (*after, step["sep"][0])
                case "TemplateProcessing":
                    parts = [part.get("SpecialToken", {}).get("id") for part in step["single"]]
                    text = parts.index(None)
                    tokens = {id: step["special_tokens"][id]["tokens"] for id in parts if id}
                    before = (*(t for id in parts[:text] for t in tokens[id]), *before)
                    after = (*after, *(t for id in parts[text + 1 :] for t in tokens[id]))
                case kind:
                    raise UserError(f"{where}: the post-processor {kind} is unknown")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{where}: not a post_processor as `tokenizers` writes it") from None
    return before, after


class TokenizerJson:
    """A tokenizer.json that jllama can encode with.

    Attributes:
      vocab: text -> id of the model's pieces.
      added: the added tokens.
      byte_level: whether it is of the byte-level family.
      prefix: where its encoding adds a space.
      prepends: whether the normaliser adds the space, before normalised added tokens are matched.
      marks: whether the normaliser replaces spaces by U+2581, before these tokens are matched.
      merges: the pairs, by falling priority.
      unk: text of the model's unknown token, or empty.
    """

    def __init__(self, file: Any, where: str):
        self._file, self._where = file, where
        token_ids(file, where)
        model = file["model"]
        kind = model.get("type") or ("BPE" if "merges" in model else "of no type")
        if kind != "BPE" or not isinstance(model["vocab"], dict):
            self._refuse(f"its model is {kind}; only byte pair encoding (BPE) can be read")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                self._refuse(f"its model has {key}")
        self.vocab: dict[str, int] = model["vocab"]
        if len(set(self.vocab.values())) < len(self.vocab):
            self._refuse("two of its pieces have one id")
        try:
            self.unk: str = model.get("unk_token") or ""
            if not isinstance(self.unk, str):
                raise TypeError
            pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
            self.merges = [(a, b) for a, b in pairs]
            self.added = [AddedToken.from_json(t, t["id"]) for t in file.get("added_tokens") or ()]
            steps = _flat(file.get("pre_tokenizer"), "pretokenizers")
            normalizers = _flat(file.get("normalizer"), "normalizers")
            decoders = [step["type"] for step in _flat(file.get("decoder"), "decoders")]
            self.byte_level = "ByteLevel" in decoders
            if self.byte_level:
                self.prefix, self.prepends, self.marks = "never", False, False
                self._check_byte_level(normalizers, steps, decoders)
            else:
                self.prepends = any(step["type"] == "Prepend" for step in normalizers)
                self._check_spaced(normalizers, steps, decoders)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{where}: not a tokenizer.json as `tokenizers` writes it") from None
        names = LETTERS if self.byte_level else BYTE_TOKENS
        missing = [name for name in names if name not in self.vocab]
        if missing:
            self._refuse(f"{len(missing)} of 256 bytes have no token ({missing[0]!r} has none)")

    def _refuse(self, reason: str) -> NoReturn:
        raise UserError(f"{self._where}: not a tokenizer that jllama can read: {reason}")

    def _check_byte_level(self, normalizers, steps, decoders) -> None:
        for step in normalizers:
            self._refuse(f"the normaliser {step['type']} changes text")
        if decoders != ["ByteLevel"]:
            self._refuse(f"its decoder is {' + '.join(decoders)}")
        if not steps or steps[-1]["type"] != "ByteLevel":
            self._refuse("its decoder is ByteLevel, but its last pre-tokeniser is not")
        for step in steps:
            if step["type"] not in ("Split", "Digits", "ByteLevel"):
                self._refuse(f"the pre-tokeniser {step['type']} is unknown")
            if step.get("behavior") == "Removed":
                self._refuse("its pre-tokeniser Split removes text")
            if step.get("add_prefix_space"):
                self._refuse("its pre-tokeniser ByteLevel adds a space (add_prefix_space)")

    def _check_spaced(self, normalizers, steps, decoders) -> None:
        known = ("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace")
        for kind in decoders or ["none"]:
            if kind not in known:
                self._refuse(f"its decoder is {kind}")
        model = self._file["model"]
        if not model.get("byte_fallback") or "ByteFallback" not in decoders:
            self._refuse("it has no byte fallback")
        if model.get("ignore_merges"):
            self._refuse(
                "ignore_merges with byte fallback encodes the names of byte tokens to them"
            )
        doubles = normalizers[-1:] == [_DOUBLE]
        if doubles:
            normalizers = normalizers[:-1]
        spaces = [{"type": "Prepend", "prepend": SPACE}] * self.prepends
        replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        for step in normalizers:
            if step not in (*spaces, replaces):
                self._refuse(f"the normaliser {step['type']} changes text")
        self.marks = replaces in normalizers
        kinds = [step["type"] for step in steps]
        # If there are two, the first adds a space before a text whose spaces are marked already.
        replacements = [" ", SPACE][2 - len(kinds) :] if kinds else []
        if kinds != ["Metaspace"] * len(replacements):
            self._refuse(f"the pre-tokeniser {' + '.join(kinds)} is unknown")
        if [step.get("replacement") for step in steps] != replacements:
            self._refuse("its Metaspace replaces a space by something else than U+2581")
        schemes = [self._scheme(step) for step in steps]
        if len(steps) == 2 and (
            not self.marks or schemes[1] != "never" or steps[0].get("split", True)
        ):
            self._refuse("its two Metaspaces do not leave spaces as they are")
        if not steps and not self.marks:
            self._refuse("nothing replaces a space by U+2581")
        self.prefix = "always" if self.prepends else next(iter(schemes), "never")
        if doubles and (self.prepends or not self.marks or self.prefix != "always"):
            self._refuse("its last normaliser doubles the space before a text")
        self._splits = any(step.get("split", True) for step in steps)

    def _scheme(self, metaspace: dict) -> Prefix:
        before = "always" if metaspace.get("add_prefix_space", True) else "never"  # older files
        scheme = metaspace.get("prepend_scheme", before)
        if scheme not in ("never", "first", "always"):
            self._refuse(f"its Metaspace has prepend_scheme {scheme!r}")
        return scheme

    def encoder(self, special: set[str]) -> tokenizers.Tokenizer:
        """Returns an encoder of plain text; the SentencePiece-like family needs U+2581 for spaces.

        It has no `special` and no added tokens, and no normaliser, template, truncation or padding.
        """
        model = self._file["model"]
        # Without special tokens in the vocabulary, no text is encoded to them.
        vocab = {piece: id for piece, id in self.vocab.items() if piece not in special}
        merges = [(a, b) for a, b in self.merges if special.isdisjoint((a, b, a + b))]
        steps = self._file.get("pre_tokenizer")
        if not self.byte_level:
            words = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never"}
            steps = words | {"split": True} if self._splits else None
        file = {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": steps,
            "model": model | {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": None},
        }
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(file))
        except Exception as e:  # tokenizers raises nothing more specific
            reason = storage.one_line(e)
            raise UserError(f"{self._where}: `tokenizers` cannot read it: {reason}") from None


def _flat(step: dict | None, key: str) -> list[dict]:
    """Returns the steps of a sequence, or the one step, or none."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[key] for inner in _flat(part, key)]
    return [step]
