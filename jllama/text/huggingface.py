"""Tokenizers of a tokenizer.json, encoded by Hugging Face's `tokenizers`.

`tokenizers` gets only the parts of the file that `jllama.text.tokenizer_json` passes on. As for
every kind of tokenizer, `jllama.text.interface` handles added tokens, the space before a text, and
decoding.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

from jllama.errors import UserError
from jllama.text.added import AddedToken, Splitter, check_added_tokens
from jllama.text.interface import SPACE, Tokenizer, to_json
from jllama.text.llama3 import BEGIN, END, STOPS
from jllama.text.tokenizer_json import BYTE_TOKENS, LETTERS, TokenizerJson

_PART = 1 << 12  # characters
_CUT = re.compile(f"[^{SPACE}](?={SPACE})")


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a tokenizer.json with byte-level or SentencePiece-like BPE.

    Attributes:
      json: the parsed file.
      added: its added tokens, and those of the files beside it.
    """

    def __init__(
        self,
        json: dict,
        where: str = "tokenizer",
        *,
        added: Iterable[AddedToken] = (),
        bos_token: str = "",
        eos_token: str = "",
        special: Iterable[str] = (),
        stop_ids: Iterable[int] = (),
        adds_bos: bool = True,
        adds_eos: bool = False,
    ):
        """Raises UserError, naming `where`, if the file is not such a tokenizer.

        Args:
          json: the file's content, which `files` gives back unchanged.
          added: tokens that are missing in the file.
          bos_token, eos_token: their texts; if empty, the usual names are looked for.
          special: texts of tokens that are special, whatever the file says.
          stop_ids: ids that end a text, besides EOS and Llama-3's.
          adds_bos, adds_eos: the attributes.
        """
        self.json = json
        file = TokenizerJson(json, where)
        known = file.vocab | {token.text: token.id for token in file.added}
        more = tuple(token for token in added if known.get(token.text) != token.id)
        tokens = [*file.added, *more]
        check_added_tokens(tokens, file.vocab, where)
        ids = known | {token.text: token.id for token in more}
        bos = _find_token(ids, bos_token, ("<s>", BEGIN), f"{where}: bos_token")
        eos = _find_token(ids, eos_token, ("</s>", END), f"{where}: eos_token")
        flagged = {token.text for token in tokens if token.special}
        declared = {text for text in special if text in ids} - flagged - {bos, eos, file.unk}
        all_special = flagged | declared | {bos, eos} | {file.unk} & ids.keys()
        options = {
            "added": more,
            "bos_token": bos,
            "eos_token": eos,
            "special": tuple(sorted(declared)),
            "stop_ids": tuple(sorted(stop_ids)),
        }
        self.added = [dataclasses.replace(t, special=t.text in all_special) for t in tokens]
        # Normalised tokens are matched after the normaliser, which puts a space before the text and
        # marks spaces.
        changes = file.prepends or file.marks
        early, late = [], []
        for token in self.added:
            is_late = changes and token.normalized and not token.special
            (late if is_late else early).append(token)
        space = " " if file.prepends else ""
        table = [b""] * (max(ids.values()) + 1)
        for piece, id in file.vocab.items():
            table[id] = _byte_level_bytes(piece) if file.byte_level else _spaced_bytes(piece)
        for token in tokens:
            table[token.id] = token.text.encode()
        for token in late:
            table[token.id] = _spaced_bytes(space + token.text)
        for text in all_special:
            table[ids[text]] = b""
        self._late = Splitter(
            AddedToken(_mark(space + token.text), token.id, single_word=token.single_word)
            for token in late
        )
        self._prepends, self._marks_spaces = file.prepends, not file.byte_level
        self._cuts = self._marks_spaces and not any(_CUT.search(piece) for piece in file.vocab)
        self._encoder = file.encoder(all_special)
        super().__init__(
            table=table,
            added=early,
            prefix=file.prefix,
            special_tokens={text: ids[text] for text in sorted(all_special, key=ids.__getitem__)},
            bos_id=ids[bos],
            eos_id=ids[eos],
            own_stops=[ids[name] for name in STOPS if name in all_special],
            adds_bos=adds_bos,
            adds_eos=adds_eos,
            options=options,
            where=where,
        )
        if not file.prepends:  # else the space after such a token is the text's own
            self._visible |= {token.id for token in late}

    def _files(self) -> dict[str, bytes]:
        settings = self._settings() | {"tokenizer_class": "PreTrainedTokenizerFast"}
        return {"tokenizer.json": to_json(self.json), "tokenizer_config.json": to_json(settings)}

    def _encode(self, text: str, prefix: bool) -> list[int]:
        ids = []
        if self._prepends and prefix:
            text, prefix = " " + text, False
        for part in self._late.split(_mark(text) if self._marks_spaces else text):
            if isinstance(part, int):
                ids.append(part)
            else:
                for words in self._cut(SPACE + part if prefix else part):
                    ids += self._encoder.encode(words, add_special_tokens=False).ids
            prefix = prefix and self._prefix == "always"
        return ids

    def _cut(self, text: str) -> Iterator[str]:
        """Cuts a long text at marked spaces, because `tokenizers` is slow on a long word.

        The ids stay the same: no piece has a space after a letter, so no merge crosses a cut.
        """
        at = 0
        while self._cuts and len(text) - at > _PART and (cut := _CUT.search(text, at + _PART)):
            yield text[at : cut.end()]
            at = cut.end()
        yield text[at:]


def _mark(text: str) -> str:
    return text.replace(" ", SPACE)


def _byte_level_bytes(piece: str) -> bytes:
    """Returns the bytes of a byte-level piece, or the piece's text if it is not one."""
    try:
        return bytes([LETTERS[letter] for letter in piece])
    except KeyError:
        return piece.encode()


def _spaced_bytes(piece: str) -> bytes:
    return BYTE_TOKENS.get(piece) or piece.replace(SPACE, " ").encode()


def _find_token(ids: dict[str, int], text: str, usual: tuple[str, ...], what: str) -> str:
    if text:
        if text not in ids:
            raise UserError(f"{what} {text!r} is not in the vocabulary; name a token that is")
        return text
    for name in usual:
        if name in ids:
            return name
    raise UserError(f"{what}: the file has none; name it in a tokenizer_config.json beside it")
