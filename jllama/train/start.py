"""The state that a run starts with: fresh, a model's, an adapter's, or a checkpoint's."""

from pathlib import Path
from typing import Any

from jllama.adapt.lora import without_whole
from jllama.config import Config, LoraConfig
from jllama.files import storage
from jllama.parallel import distributed
from jllama.parallel.sharding import Placement
from jllama.store.adapter import note_base
from jllama.store.model import StoredModel, read_base
from jllama.train.origin import check_origin, note_origin
from jllama.train.state import (
    StateDef,
    TrainState,
    base_quantizer,
    base_shapes,
    init_state,
    load_state,
    start_from,
)


def start_state(
    config: Config,
    placement: Placement,
    definition: StateDef,
    folder: Path,
    step: int = 0,
    initial: StoredModel | None = None,
) -> tuple[TrainState, Any]:
    """Returns the state, and `frozen`, the step's second argument. Every process calls it.

    The state is that of the run's checkpoint of `step`, or where `step` is 0 one whose parameters
    are those of `initial`, or where that is None fresh ones. `frozen` is the base's parameters if
    `config.adapt` trains an overlay, and () if not.

    Args:
      folder: the run's. Where an overlay is trained, its base is noted there in base.json.
      initial: what `open_initial(config)` returns. It is not needed to resume, except for an
        overlay, whose base no checkpoint holds. Parameters to resume from are not read from it, but
        compared with those that the run began with.

    Raises `UserError` when a checkpoint or a model cannot be read, or when the base is not the one
    that the run began with.
    """
    if not isinstance(config.adapt, LoraConfig):
        return _start_all(config, definition, folder, step, initial), ()
    base, digest = read_base(initial, base_shapes(config, placement), base_quantizer(config))
    model = str(storage.absolute(initial.place))
    distributed.together(lambda: note_base(folder, model, digest) if distributed.leader() else None)
    if step:
        state = load_state(folder, step, definition)
    elif initial.adapters:
        (adapter,) = initial.adapters.values()
        _, overlay = adapter.read(config.model, placement, base, digest)
        state = start_from(definition, overlay)
    else:
        state = init_state(definition, config.run.seed, base)
    # A base parameter that is trained whole is in the state; the step does not need it twice.
    return state, without_whole(base, definition.shapes.trainable)


def _start_all(
    config: Config, definition: StateDef, folder: Path, step: int, initial: StoredModel | None
) -> TrainState:
    """`start_state` where every parameter is trained."""
    if initial is not None:
        where, params = config.training.init_from, initial.read(definition.placed.trainable)
        if step:
            check_origin(folder, where, params)
        note_origin(folder, where, params)
        if not step:
            return start_from(definition, params)
    return load_state(folder, step, definition) if step else init_state(definition, config.run.seed)
