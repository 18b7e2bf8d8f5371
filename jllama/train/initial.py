"""What a run begins from: a model, or an adapter that it trains on over the adapter's own base."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

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
from jllama.store.adapter import Adapter, base_path, is_adapter, open_adapted, open_adapter
from jllama.store.model import StoredModel, differences, open_model


class Initial(NamedTuple):
    """The model, or the base; and the adapter over it that is trained on."""

    model: StoredModel
    adapter: Adapter | None


def open_initial(config: Config) -> Initial | None:
    """What `training.init_from` names, not read yet; says on stderr where it is another.

    Raises UserError when it has other shapes than the recipe's.
    """
    where = config.training.init_from
    if not where:
        return None
    try:
        found = _open(config, storage.path(where))
    except UserError as e:
        raise type(e)(f"training.init_from: {e}") from None
    stored, adapter = found
    there = stored.config
    if adapter is None or adapter.format == "peft":
        # Padding of the tables is added or dropped where they are read.
        there = dataclasses.replace(there, vocab_multiple=config.model.vocab_multiple)
    fatal, said = differences(there, config.model)
    if fatal:
        if config.model.vocab_size > stored.config.vocab_size:
            said.append("more rows are given by jllama vocabulary grow")
        raise UserError(
            f"training.init_from={where}: its parameters are not the recipe's model: "
            + "; ".join(said)
        )
    if adapter is not None:
        _check_overlay(config, adapter)
        if adapter.format == "jllama" and adapter.quantize != config.adapt.quantize:
            said.append(f"adapt.quantize is {config.adapt.quantize}, there {adapter.quantize}")
    if distributed.leader():
        for line in said + _lengths(stored.config, config.model):
            say(f"note: training.init_from={where}: {line}")
    return found


def _open(config: Config, path: Path) -> Initial:
    adapts = isinstance(config.adapt, LoraConfig)
    if not is_adapter(path):
        if adapts and config.adapt.base:
            raise UserError(f"{path}: is no adapter, and adapt.base is for one; leave that out")
        return Initial(open_model(path, model=config.model), None)
    if not adapts:
        raise UserError(
            f"{path}: is an adapter: adapt.kind=lora trains it on; to train all parameters, begin"
            f" from what `jllama convert BASE DST --adapter {path}` makes"
        )
    base = base_path(open_adapter(path), config.adapt.base)
    stored, found = open_adapted(base, {path.name: path}, model=config.model)
    return Initial(stored, found[path.name])


def _check_overlay(config: Config, adapter: Adapter) -> None:
    """Raises UserError where `adapt` says another overlay than the adapter is."""
    there = layout(config.model, adapter.lora(config.model))
    here = layout(config.model, config.adapt)
    for path in sorted(there.keys() | here.keys()):
        if there.get(path) != here.get(path):
            raise UserError(
                f"training.init_from={adapter.path}: its overlay is another than adapt says:"
                f" {path} {there.get(path, 'is frozen')} there, {here.get(path, 'is frozen')} here;"
                f" say the same (jllama info {adapter.path})"
            )


def _lengths(there: ModelConfig, here: ModelConfig) -> list[str]:
    """What a model of another length, or a scaling made for one, should know."""
    said = []
    if here.max_length != there.max_length:
        said.append(f"model.max_length is {here.max_length}, there {there.max_length}")
    trained, wanted, rope = original_length(there), original_length(here), here.rope
    if wanted == trained or isinstance(rope, NoRopeScaling | NtkRopeScaling):
        return said
    if isinstance(rope, LinearRopeScaling):
        said.append(
            f"model.rope.factor={rope.factor:g} takes model.max_length={here.max_length} to"
            f" {wanted} positions, and it was trained for {trained}; the factor that fits is"
            f" {max(1, here.max_length / trained):g}"
        )
    else:
        inside = rope.factor if isinstance(rope, AdaptiveRopeScaling) else 1.0
        said.append(
            f"model.rope.original_length={rope.original_length} is not what it was trained for;"
            f" that would be {round(trained * inside)}"
        )
    return said
