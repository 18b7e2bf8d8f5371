"""Llama-3's tokenizer: byte pair encoding from a tiktoken-format tokenizer.model.

A line of the file has a piece in base64, a space, and the piece's rank, which is its id. The file
has neither the names of the 256 special tokens, whose ids follow, nor the pattern that cuts a text
into words; this module has them.
"""

import base64
import binascii
import functools
import re
from collections.abc import Iterable

import tiktoken

from jllama.errors import UserError
from jllama.text.added import AddedToken
from jllama.text.interface import Tokenizer, to_json

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMES = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    "<|image|>",
)  # fmt: skip
NUM_SPECIAL = 256
SPECIAL_TOKENS = (
    *_NAMES,
    *(f"<|reserved_special_token_{2 + i}|>" for i in range(NUM_SPECIAL - len(_NAMES))),
)
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
STOPS = (END, "<|eom_id|>", "<|eot_id|>")

# tiktoken's regular expression backtracks over white space, and panics on a run of more than about
# 400,000 characters. So a run of this length is cut here as the pattern would cut it.
_RUN = 100_000
# The pattern means Unicode's white space; Python's \s has U+001C to U+001F too.
_NO_BREAK = "\t\v\f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_LONG_RUN = re.compile(f"[\r\n{_NO_BREAK}]{{{_RUN},}}")


class TiktokenTokenizer(Tokenizer):
    """Byte pair encoding by ranks, with Llama-3's 256 special tokens after the ranks.

    Attributes:
      model: the file's bytes.
      ranks: bytes of a piece -> its id.
    """

    def __init__(
        self,
        model: bytes,
        where: str = "tokenizer",
        *,
        added: Iterable[AddedToken] = (),
        bos_token: str = "",
        eos_token: str = "",
        stop_ids: Iterable[int] = (),
        adds_bos: bool = True,
        adds_eos: bool = False,
    ):
        """Raises UserError, with the number of the line, if the file is damaged.

        Args:
          model: the bytes of the file.
          added: the special tokens in other files; it is an error if they differ from Llama-3's.
          bos_token, eos_token: special tokens to use instead of Llama-3's.
          stop_ids: ids that end a text, besides those of Llama-3.
          adds_bos, adds_eos: the attributes.
        """
        self.model = model
        self.ranks = _ranks(model, where)
        special = {name: len(self.ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        for token in added:
            if special.get(token.text) != token.id:
                raise UserError(
                    f"{where}: added token {token.text!r} with the id {token.id} is none of"
                    " Llama-3's special tokens; put the tokenizer.json that has it beside this file"
                )
        for key, token in (("bos_token", bos_token), ("eos_token", eos_token)):
            if token and token not in special:
                raise UserError(f"{where}: {key} {token!r} is none of Llama-3's special tokens")
        options = {
            "bos_token": bos_token or BEGIN,
            "eos_token": eos_token or END,
            "stop_ids": tuple(sorted(stop_ids)),
            "added": (),
            "special": (),
        }
        self._bpe = tiktoken.Encoding(
            "llama3", pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens=special
        )
        super().__init__(
            table=[*self.ranks, *[b""] * NUM_SPECIAL],
            added=(),
            prefix="never",
            special_tokens=special,
            bos_id=special[options["bos_token"]],
            eos_id=special[options["eos_token"]],
            own_stops=[special[name] for name in STOPS],
            adds_bos=adds_bos,
            adds_eos=adds_eos,
            options=options,
            where=where,
        )

    def _files(self) -> dict[str, bytes]:
        files = {"tokenizer.model": self.model}
        settings = self._settings()
        if settings != {"bos_token": BEGIN, "eos_token": END}:
            files["tokenizer_config.json"] = to_json(settings)
        return files

    def _encode(self, text: str, prefix: bool) -> list[int]:
        ids, at = [], 0
        for match in _LONG_RUN.finditer(text):
            start, end = match.span()
            # A word of punctuation includes the line breaks after it.
            if start and not text[start - 1].isalnum():
                start = end - len(text[start:end].lstrip("\r\n"))
            breaks = start + len(text[start:end].rstrip(_NO_BREAK))
            # The last space belongs to the next word.
            rest = end - (end < len(text) and breaks < end)
            ids += self._bpe.encode_ordinary(text[at:start])
            for piece in (text[start:breaks], text[breaks:rest]):
                ids += self._piece.encode_ordinary(piece)
            at = rest
        return ids + self._bpe.encode_ordinary(text[at:])

    @functools.cached_property
    def _piece(self) -> tiktoken.Encoding:
        """Encodes any text as one word."""
        return tiktoken.Encoding(
            "llama3-piece", pat_str=r"(?s:.+)", mergeable_ranks=self.ranks, special_tokens={}
        )


def is_tiktoken(data: bytes) -> bool:
    """Whether a file begins like a tiktoken file: base64, a space and a number."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data[:4096] + b"\n") is not None


def _ranks(model: bytes, where: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    lines = model.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    for number, line in enumerate(lines, 1):
        piece, space, rank = line.removesuffix(b"\r").partition(b" ")
        try:
            token = base64.b64decode(piece, validate=True)
        except binascii.Error:
            token = b""
        if not token or not space or not rank.isdigit() or len(rank) > 9:
            raise UserError(
                f"{where}:{number}: not a piece in base64, a space and a rank; the file is damaged"
            )
        if int(rank) != len(ranks):
            raise UserError(
                f"{where}:{number}: rank {int(rank)} where {len(ranks)} is due: ranks count up "
                " from 0; the file is damaged"
            )
        if token in ranks:
            raise UserError(
                f"{where}:{number}: repeats the piece {token!r} of rank {ranks[token]}; the file is"
                " damaged"
            )
        ranks[token] = len(ranks)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(
            f"{where}:{len(lines)}: the file ends without the single byte 0x{missing[0]:02X}"
            f" ({len(missing)} of 256 bytes are missing); it is damaged"
        )
    return ranks
