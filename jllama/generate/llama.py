"""The public door: a trained model from a folder, with its tokenizer.

B rows, T positions, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jllama.adapt import lora
from jllama.adapt.mixture import Mixture, join_overlays, mixture_weights, weighted
from jllama.adapt.quant import quantizer
from jllama.chips import use_compilation_cache
from jllama.config import ComputeConfig, MeshConfig, ModelConfig, ShardingConfig
from jllama.errors import UserError
from jllama.files import storage
from jllama.generate import engine
from jllama.generate.sampling import Sampling
from jllama.model import llama
from jllama.model.rope import Turns, turns
from jllama.parallel.context import context_placement
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement, activated
from jllama.store.find import find
from jllama.store.model import open_adapted, read_base
from jllama.text.infill import EOT, Infill, infill_tokens, middle_stream, prompt_ids
from jllama.text.interface import TextStream, Tokenizer

# New tokens when nobody says how many; fewer where the model has no room for them.
DEFAULT_NEW_TOKENS = 256


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

    def logits(self, tokens: Any, length: int | None = None, adapter: Mixture = None) -> jax.Array:
        """tokens [B,T] of ids, each row one text from position 0 -> logits [B,T,V] float32.

        `length` matters where RoPE depends on it (kinds `dynamic` and `adaptive`): that of the
        whole text, of which the tokens may be a beginning; default T.

        Raises `UserError` for another shape, a length below T, or an id outside the vocabulary.
        """
        try:
            tokens = np.asarray(tokens)
        except ValueError:
            raise UserError("logits: rows of several lengths; give rows of one") from None
        if tokens.ndim != 2 or tokens.size == 0 or tokens.dtype.kind not in "iu":
            raise UserError(f"logits: expected ids [B,T], not {tokens.dtype} {tokens.shape}")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise UserError(
                f"logits: ids from {tokens.min()} to {tokens.max()} are not all in the vocabulary"
                f" of {self.config.vocab_size}"
            )
        if length is not None and length < tokens.shape[1]:
            raise UserError(f"logits: length={length} is below the {tokens.shape[1]} ids of a row")
        angles = turns(self.config, tokens.shape[1] if length is None else length)
        overlay = self.overlay(adapter)
        tokens = tokens.astype(np.int32)
        placement = context_placement(self.params)
        return _logits(self.params, self.config, self.compute, tokens, angles, overlay, placement)

    def generate(
        self,
        prompts: str | Infill | Sequence[str | Infill | Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        num_samples: int = 1,
        seed: int = 0,
        batch_size: int = 32,
        adapter: Mixture | Sequence[Mixture] = None,
    ) -> list[str]:
        """Continuations, without their prompts: `num_samples` of the first prompt, and so on.

        A continuation ends at a stop id of the tokenizer (EOS; of Llama 3 also the ends of a turn
        and of a message), which is not part of it, or at `max_new_tokens`. It is a function of its
        prompt, its number among the samples, the seed and the settings, and not of
        what else is generated with it.

        Args:
          prompts: a text or several; texts get a BOS unless the tokenizer adds none. Or ids, taken
            as they are. An empty prompt of either kind is BOS alone. Or an `Infill`, of which the
            middle is written.
          max_new_tokens: default `DEFAULT_NEW_TOKENS`, or what the model's `max_length` leaves.
          temperature, top_k, top_p, repetition_penalty: see `jllama.generate.sampling.Sampling`.
          batch_size: continuations generated at a time.
          adapter: for all prompts, or a list with one for each.

        Raises:
          UserError: for impossible settings, ids that are not in the vocabulary, or a prompt that
            exceeds the model's `max_length` together with its new tokens.
        """
        for name, count in (("num_samples", num_samples), ("batch_size", batch_size)):
            if count < 1:
                raise UserError(f"{name}={count}: must be at least 1")
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        )
        prompts = [prompts] if isinstance(prompts, str | Infill) else list(prompts)
        several = isinstance(adapter, Sequence) and not isinstance(adapter, str)
        mixtures = list(adapter) if several else [adapter] * len(prompts)
        if len(mixtures) != len(prompts):
            raise UserError(f"adapter: {len(mixtures)} of them for {len(prompts)} prompts")
        requests = [
            self._request(prompt, max_new_tokens, sampling, seed, number, mixture)
            for prompt, mixture in zip(prompts, mixtures, strict=True)
            for number in range(num_samples)
        ]
        drawn = []
        for start in range(0, len(requests), batch_size):
            drawn += self._engine(engine.generate, requests[start : start + batch_size])
        texts = []
        for i, (request, ids) in enumerate(zip(requests, drawn, strict=True)):
            text = self._text(prompts[i // num_samples], request)
            texts.append("".join([text.feed(i) for i in ids]) + text.end())
        return texts

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
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        sample: int = 0,
        seed: int = 0,
        adapter: Mixture = None,
    ) -> Iterator[str]:
        """The pieces of one continuation as they come; joined, they are what `generate` returns.

        `sample` is the continuation's number among `generate`'s `num_samples`. Raises as
        `generate` does, before the first piece.
        """
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        )
        request = self._request(prompt, max_new_tokens, sampling, seed, sample, adapter)
        text = self._text(prompt, request)
        events = self._engine(engine.stream, [request])
        return (text.end() if token is None else text.feed(token) for _, token in events)

    def _request(self, prompt, max_new_tokens, sampling, seed, number, adapter) -> engine.Request:
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise UserError("generate: the model's folder has no tokenizer; put its files there")
        stop = tokenizer.stop_ids
        if isinstance(prompt, Infill):
            ids = tuple(prompt_ids(tokenizer, prompt))
            stop |= {infill_tokens(tokenizer).end}
        elif isinstance(prompt, str):
            ids = tuple(tokenizer.encode(prompt, bos=tokenizer.adds_bos)) or (tokenizer.bos_id,)
            # What a model learnt to infill ends so, if it was cut in three.
            stop |= {i for piece, i in tokenizer.special_tokens.items() if piece == EOT}
        else:
            ids = tuple(int(i) for i in prompt) or (tokenizer.bos_id,)
        if max_new_tokens is None:
            # At least one, so that a prompt which leaves no room is an error and not no text.
            max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, self.config.max_length - len(ids)))
        return engine.Request(
            prompt=ids,
            max_new_tokens=max_new_tokens,
            mixture=self._weights(adapter),
            sampling=sampling,
            stop=stop,
            seed=seed,
            number=number,
        )

    def _text(self, prompt, request: engine.Request) -> TextStream:
        if isinstance(prompt, Infill):
            return middle_stream(self.tokenizer, prompt)
        return self.tokenizer.stream(after=request.prompt)

    def _engine(self, function, requests):
        # A vocabulary may be padded beyond the tokenizer's: such ids are never drawn.
        vocab_size = min(self.tokenizer.vocab_size, self.config.vocab_size)
        return function(self.params, self.config, self.compute, requests, vocab_size, self.overlays)


@functools.partial(jax.jit, static_argnames=("config", "compute", "placement"))
def _logits(
    params: llama.Params,
    config: ModelConfig,
    compute: ComputeConfig,
    tokens: jax.Array,
    turns: Turns,
    overlay: lora.Overlay | None,
    placement: Placement | None,
) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    with activated(placement):
        hidden, _ = llama.apply(
            params, config, compute, tokens, positions, turns=turns, lora=overlay
        )
        return llama.logits(params, config, hidden)


def load(
    path: str | Path,
    dtype: str | None = None,
    model: str | None = None,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
) -> Llama:
    """A trained model: a run (its newest checkpoint), a step of it, or a model's folder.

    Args:
      path: a run folder, RUN/checkpoints/STEP, or a folder of this project, Hugging Face or Meta;
        local, or a URL: gs://, s3://. Or an adapter, which is loaded over its base.
      dtype: "float32" or "bfloat16" for the computation; default the run's own, or what the folder
        is stored in (float32 for float16). Matrices are kept in it too, which changes no result:
        they would be cast at every use. Norms are kept in float32.
      model: what a folder of Meta's is, where it does not say all: a name in configs/model, or a
        file like those.
      adapter: one to load over the model, or several by name: a run with `adapt.kind=lora`, a step
        of it, or a folder of PEFT's. What was trained over a quantised base gets one.

    Raises:
      UserError: if the path is none of these, the run has no checkpoint, the folder holds what
        cannot be expressed here, the dtype is another, an adapter is one of another model, or
        several cannot be had together.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r}: must be float32 or bfloat16")
    path = storage.path(path)
    if isinstance(adapter, str | Path):
        adapter = {storage.path(adapter).name: adapter}
    if not isinstance(adapter, Mapping | None):
        raise UserError(f"adapter={adapter!r}: expected a path, or several by name: {{name: path}}")
    stored = open_adapted(find(path), adapter, model)
    config, adapters = stored.config, stored.adapters
    use_compilation_cache(stored.compilation_cache)
    compute = stored.compute if dtype is None else dataclasses.replace(stored.compute, dtype=dtype)
    placement, placed = _placed(config, compute.dtype)
    overlays, whole = None, ()
    if not adapters:
        params = stored.read(placed)
    else:
        kind = next(a.quantize for a in adapters.values())
        params, digest = read_base(stored, placed, quantizer(config, kind))
        read = [a.read(config, placement, params, digest) for a in adapters.values()]
        whole = tuple(path for _, o in read for path in lora.whole_leaves(o))
        params, overlays = join_overlays(params, read, tuple(adapters))
    return Llama(config, params, stored.tokenizer, compute, tuple(adapters), overlays, whole)


def _placed(config: ModelConfig, dtype: str) -> tuple[Placement, llama.Params]:
    """Shapes on this process's devices, or on one of them where the model's sizes do not divide.

    They are not those of the training: the run's mesh and placement say nothing.
    """

    def on(devices: list[jax.Device]) -> tuple[Placement, llama.Params]:
        placement = Placement(make_mesh(MeshConfig(), devices), ShardingConfig())
        return placement, llama.placed_shapes(config, placement, dtype, "float32")

    devices = jax.local_devices()
    try:
        return on(devices)
    except UserError:
        return on(devices[:1])
