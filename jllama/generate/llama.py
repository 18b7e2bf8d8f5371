"""The public door: a trained model from a folder, with its tokenizer.

B rows, T positions, V vocabulary.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jllama.adapt import lora
from jllama.adapt.mixture import Mixture, mixture_weights, weighted
from jllama.config import ComputeConfig, ModelConfig
from jllama.errors import UserError
from jllama.generate import engine, scoring
from jllama.generate.choices import TextOrIds, pairs
from jllama.generate.completion import (
    DEFAULT_NEW_TOKENS,
    Completion,
    CompletionWriter,
    GenerationSettings,
    write,
)
from jllama.generate.scoring import ChoiceScore
from jllama.model import llama
from jllama.text.continuation import text_ids
from jllama.text.infill import EOT, Infill, infill_tokens, middle_stream, prompt_ids
from jllama.text.interface import TextStream, Tokenizer

Prompt = str | Infill | Sequence[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Llama:
    """A model that is ready for use.

    Attributes:
      config: the architecture.
      params: nested dict of arrays; layout in `jllama.model.llama`.
      tokenizer: text to ids and back; None where the folder has none, and then texts are an error.
      compute: dtypes and blocking of the computation.
      adapters: the names of the adapters that were loaded over it.
      overlays: these adapters, from `jllama.adapt.mixture.join_overlays`; None if there are none.
      whole: names of parameters in `params` that the adapter has replaced.

    The argument `adapter` of the methods is a `jllama.adapt.mixture.Mixture`.
    """

    config: ModelConfig
    params: llama.Params
    tokenizer: Tokenizer | None
    compute: ComputeConfig
    adapters: tuple[str, ...] = ()
    overlays: lora.Overlay | None = None
    whole: tuple[str, ...] = ()

    def overlay(self, adapter: Mixture = None) -> lora.Overlay | None:
        """The argument `lora` of `llama.apply`, all rows alike."""
        if self.overlays is None:
            self._weights(adapter)
            return None
        return weighted(self.overlays, np.array([self._weights(adapter)], np.float32))

    def _weights(self, adapter: Mixture) -> tuple[float, ...]:
        return mixture_weights(adapter, self.adapters, self.whole)

    def logits(
        self, tokens: Any, length: int | None = None, adapter: Mixture = None
    ) -> jax.Array | list[np.ndarray]:
        """tokens [B,T] of ids, each row one text from position 0 -> logits [B,T,V] float32.

        Rows may have several lengths: a list of rows gives a list of arrays [T,V] with the T of
        each row. They are computed together, padded to the longest, and then copied to the host.

        `length` matters where RoPE depends on it (kinds `dynamic` and `adaptive`): that of the
        whole text, of which the tokens may be a beginning; default the row's own.

        Raises `UserError` for another shape, a length below T, or an id outside the vocabulary.
        """
        rows = scoring.rows_of(tokens, self.config.vocab_size)
        lengths = [len(row) for row in rows]
        if length is not None and length < max(lengths):
            raise UserError(f"logits: length={length} is below the {max(lengths)} ids of a row")
        padded = scoring.logits(self._reader(adapter), rows, length)
        if min(lengths) == max(lengths):
            return padded[:, : lengths[0]]
        # On the host, where cutting off the padding compiles nothing.
        return [row[:T] for row, T in zip(np.asarray(padded), lengths, strict=True)]

    def score(
        self,
        prompts: str | Sequence[TextOrIds],
        choices: Sequence[str] | Sequence[Sequence[TextOrIds]],
        *,
        special: bool = False,
        adapter: Mixture = None,
    ) -> list[list[ChoiceScore]]:
        """How likely each choice is as the continuation of each prompt.

        Args:
          prompts: a text or several; texts get a BOS unless the tokenizer adds none. Or ids, taken
            as they are. An empty prompt of either kind is BOS alone.
          choices: texts, the same for all prompts; or a list of its choices for each prompt. Those
            of a prompt of ids are ids. White space between prompt and choice belongs to the choice,
            on whichever side it is: see `jllama.text.continuation.choice_ids`.
          special: whether the text of a special token is that token.

        Returns:
          For each prompt, the scores of its choices in their order.

        Raises:
          UserError: for an empty choice, ids that are not in the vocabulary, or a prompt that
            exceeds the model's `max_length` together with a choice.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        paired = pairs(self.tokenizer, self.config, prompts, choices, special)
        flat = [pair for of_prompt in paired for pair in of_prompt]
        rows, counts = [a + b for a, b in flat], [len(b) for _, b in flat]
        values = iter(scoring.logprobs(self._reader(adapter), rows, counts))
        return [
            [ChoiceScore(ids=tuple(b), logprobs=tuple(next(values))) for _, b in of_prompt]
            for of_prompt in paired
        ]

    def generate(
        self,
        prompts: str | Infill | Sequence[Prompt],
        *,
        num_samples: int = 1,
        batch_size: int = 32,
        adapter: Mixture | Sequence[Mixture] = None,
        **settings: Any,
    ) -> list[str]:
        """Continuations, without their prompts: `num_samples` of the first prompt, and so on.

        A continuation ends at a stop id of the tokenizer (EOS; of Llama 3 also the ends of a turn
        and of a message) or before a stop string, neither of which is part of it, or at
        `max_new_tokens`. It is a function of its prompt, its number among the samples, the seed and
        the settings, and not of what else is generated with it.

        Args:
          prompts: a text or several; texts get a BOS unless the tokenizer adds none. Or ids, taken
            as they are. An empty prompt of either kind is BOS alone. Or an `Infill`, of which the
            middle is written.
          batch_size: continuations generated at a time.
          adapter: for all prompts, or a list with one for each.
          settings: temperature, top_k, top_p, repetition_penalty, max_new_tokens, stop, special and
            seed; `jllama.generate.completion.GenerationSettings` has their meanings and defaults.

        Raises:
          UserError: for impossible settings, ids that are not in the vocabulary, or a prompt that
            exceeds the model's `max_length` together with its new tokens.
        """
        completions = self.complete(
            prompts, num_samples=num_samples, batch_size=batch_size, adapter=adapter, **settings
        )
        return [completion.text for completion in completions]

    def complete(
        self,
        prompts: str | Infill | Sequence[Prompt],
        *,
        num_samples: int = 1,
        batch_size: int = 32,
        adapter: Mixture | Sequence[Mixture] = None,
        **settings: Any,
    ) -> list[Completion]:
        """What `generate` returns, with ids, log-probabilities and the reason for each end.

        Arguments and errors are those of `generate`.
        """
        for name, count in (("num_samples", num_samples), ("batch_size", batch_size)):
            if count < 1:
                raise UserError(f"{name}={count}: must be at least 1")
        wanted = GenerationSettings(**settings)
        prompts = [prompts] if isinstance(prompts, str | Infill) else list(prompts)
        several = isinstance(adapter, Sequence) and not isinstance(adapter, str)
        mixtures = list(adapter) if several else [adapter] * len(prompts)
        if len(mixtures) != len(prompts):
            raise UserError(f"adapter: {len(mixtures)} of them for {len(prompts)} prompts")
        numbered = [
            (prompt, number, mixture)
            for prompt, mixture in zip(prompts, mixtures, strict=True)
            for number in range(num_samples)
        ]
        out = []
        for start in range(0, len(numbered), batch_size):
            pieces, writers = self._write(numbered[start : start + batch_size], wanted)
            collections.deque(pieces, maxlen=0)
            out += [writer.completion() for writer in writers]
        return out

    def infill(
        self,
        prefix: str,
        suffix: str,
        *,
        format: Literal["psm", "spm"] = "psm",
        **settings: Any,
    ) -> list[str]:
        """Middles between `prefix` and `suffix`, by a model that was trained to infill.

        One ends at the infill token EOT, as at what ends a text elsewhere. It is exact: no space
        is added or lost. `settings` are those of `generate`; so are the errors, and `UserError`
        for a tokenizer without infill tokens. Several prompts at once: `generate` of `Infill`s.

        Args:
          format: the order in which the model reads: prefix, suffix (psm) or suffix, prefix (spm).
        """
        return self.generate(Infill(prefix, suffix, format), **settings)

    def stream(
        self,
        prompt: str | Infill | Sequence[int] = "",
        *,
        sample: int = 0,
        adapter: Mixture = None,
        **settings: Any,
    ) -> Iterator[str]:
        """The pieces of one continuation as they come; joined, they are what `generate` returns.

        `sample` is the continuation's number among `generate`'s `num_samples`; `settings` are
        those of `generate`. Raises as `generate` does, before the first piece.
        """
        pieces, _ = self._write([(prompt, sample, adapter)], GenerationSettings(**settings))
        return pieces

    def _reader(self, adapter: Mixture) -> scoring.Reader:
        return scoring.Reader(self.params, self.config, self.compute, self.overlay(adapter))

    def _write(self, numbered, settings) -> tuple[Iterator[str], list[CompletionWriter]]:
        """All pieces of text, and the writers that they come from, one for each of `numbered`.

        These are tuples: prompt, number of the sample, mixture.
        """
        requests = [self._request(*one, settings) for one in numbered]
        # A vocabulary may be padded beyond the tokenizer's: such ids are never drawn.
        vocab_size = min(self.tokenizer.vocab_size, self.config.vocab_size)
        cancelled: set[int] = set()
        model = self.params, self.config, self.compute
        events = engine.stream(*model, requests, vocab_size, self.overlays, cancelled)
        writers = [
            CompletionWriter(self._text(prompt, request), settings.stop)
            for (prompt, _, _), request in zip(numbered, requests, strict=True)
        ]
        return write(events, writers, cancelled), writers

    def _request(self, prompt, number, mixture, settings) -> engine.Request:
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise UserError(
                "generate: the model has no tokenizer; load it with one (tokenizer=PATH,"
                " --tokenizer PATH)"
            )
        stop = tokenizer.stop_ids
        if isinstance(prompt, Infill):
            ids = tuple(prompt_ids(tokenizer, prompt))
            stop |= {infill_tokens(tokenizer).end}
        elif isinstance(prompt, str):
            ids = tuple(text_ids(tokenizer, prompt, settings.special))
            # What a model learnt to infill ends so, if it was cut in three.
            stop |= {i for piece, i in tokenizer.special_tokens.items() if piece == EOT}
        else:
            ids = tuple(int(i) for i in prompt) or (tokenizer.bos_id,)
        max_new_tokens = settings.max_new_tokens
        if max_new_tokens is None:
            # At least one, so that a prompt which leaves no room is an error and not no text.
            max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, self.config.max_length - len(ids)))
        return engine.Request(
            prompt=ids,
            max_new_tokens=max_new_tokens,
            mixture=self._weights(mixture),
            sampling=settings,
            stop=stop,
            seed=settings.seed,
            number=number,
        )

    def _text(self, prompt, request: engine.Request) -> TextStream:
        if isinstance(prompt, Infill):
            return middle_stream(self.tokenizer, prompt)
        return self.tokenizer.stream(after=request.prompt)
