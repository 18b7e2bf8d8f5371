"""What a run begins from: a model, or an adapter that it trains on over the adapter's base."""

import dataclasses

from jllama.adapt.lora import layout
from jllama.config import (
    AdaptiveRopeScaling,
    Config,
    LinearRopeScaling,
    LoraConfig,
    ModelConfig,
    NoRopeScaling,
    NtkRopeScaling,
)
from jllama.errors import UserError
from jllama.files import storage
from jllama.model.rope import original_length
from jllama.parallel import distributed
from jllama.progress import say
from jllama.store.adapter import Adapter, base_of, differences, open_adapter
from jllama.store.find import Found, find
from jllama.store.model import StoredModel, open_model, with_adapters


def open_initial(config: Config) -> StoredModel | None:
    """The model that `training.init_from` names, or the adapter that is trained on, with its base.

    Differences from the recipe that change no shape are reported on stderr. Raises UserError for
    those that do.
    """
    where = config.training.init_from
    if not where:
        return None
    try:
        initial = _open(config, find(storage.path(where)))
    except UserError as e:
        raise type(e)(f"training.init_from: {e}") from None
    theirs = initial.config
    if all(adapter.found.format == "peft" for adapter in initial.adapters.values()):
        # Padding of the tables is added or dropped where they are read.
        theirs = dataclasses.replace(theirs, vocab_multiple=config.model.vocab_multiple)
    shapes_differ, notes = differences(theirs, config.model)
    if shapes_differ:
        raise UserError(
            f"training.init_from={where}: its parameters are not the recipe's model: "
            + "; ".join([*notes, _way(config, initial, theirs)])
        )
    for adapter in initial.adapters.values():
        _check_overlay(config, adapter)
        if adapter.found.format == "jllama" and adapter.quantize != config.adapt.quantize:
            notes.append(f"adapt.quantize is {config.adapt.quantize}, there {adapter.quantize}")
    if distributed.leader():
        for line in notes + _length_notes(theirs, config.model):
            say(f"note: training.init_from={where}: {line}")
    return initial


def _open(config: Config, found: Found) -> StoredModel:
    adapts = isinstance(config.adapt, LoraConfig)
    if not found.is_adapter:
        if adapts and config.adapt.base:
            raise UserError(
                f"{found.path}: is no adapter, and adapt.base is for one; leave that out"
            )
        return open_model(found, config.model)
    if not adapts:
        raise UserError(
            f"{found.path}: is an adapter: adapt.kind=lora trains it on; to train all parameters,"
            f" begin from what `jllama convert BASE DST --adapter {found.path}` makes"
        )
    adapter = open_adapter(found)
    base = open_model(base_of(adapter, config.adapt.base), config.model)
    return with_adapters(base, {found.path.name: adapter})


def _way(config: Config, initial: StoredModel, theirs: ModelConfig) -> str:
    """What to do where the parameters of `initial`, of model `theirs`, do not fit the recipe's."""
    where, ours = config.training.init_from, config.model
    for adapter in initial.adapters.values():  # there is one at most
        of_peft = adapter.found.format == "peft"
        return f"--model={initial.found.path if of_peft else where} takes its model"
    otherwise, _ = differences(dataclasses.replace(theirs, vocab_size=ours.vocab_size), ours)
    if ours.vocab_size > theirs.vocab_size and not otherwise:
        return "more rows are given by jllama vocabulary grow"
    if initial.tokenizer is None:
        return f"--model={where} takes its model"
    return f"--from={where} takes its model and tokenizer too"


def _check_overlay(config: Config, adapter: Adapter) -> None:
    """Raises UserError where `config.adapt` describes another overlay than the adapter holds."""
    adapter_layout = layout(config.model, adapter.lora(config.model))
    recipe_layout = layout(config.model, config.adapt)
    for path in sorted(adapter_layout.keys() | recipe_layout.keys()):
        theirs, ours = (x.get(path, "is frozen") for x in (adapter_layout, recipe_layout))
        if theirs != ours:
            raise UserError(
                f"training.init_from={adapter.path}: its overlay is another than adapt says:"
                f" {path} {theirs} there, {ours} here; say the same (jllama info {adapter.path})"
            )


def _length_notes(initial: ModelConfig, wanted: ModelConfig) -> list[str]:
    """Notes on a recipe whose lengths do not follow from those that `initial` was trained for."""
    notes, rope = [], wanted.rope
    if wanted.max_length != initial.max_length:
        notes.append(f"model.max_length is {wanted.max_length}, there {initial.max_length}")
    trained, implied = original_length(initial), original_length(wanted)
    if implied == trained or isinstance(rope, NoRopeScaling | NtkRopeScaling):
        return notes
    if isinstance(rope, LinearRopeScaling):
        notes.append(
            f"model.rope.factor={rope.factor:g} takes model.max_length={wanted.max_length} to"
            f" {implied} positions, and it was trained for {trained}; the factor that fits is"
            f" {max(1, wanted.max_length / trained):g}"
        )
    else:
        inside = rope.factor if isinstance(rope, AdaptiveRopeScaling) else 1.0
        notes.append(
            f"model.rope.original_length={rope.original_length} is not what it was trained for;"
            f" that would be {round(trained * inside)}"
        )
    return notes
