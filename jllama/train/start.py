"""The state that a run starts with: fresh, a model's, an adapter's, another run's, or its own."""

from pathlib import Path
from typing import Any

from jllama.adapt.lora import without_whole
from jllama.config import Config, LoraConfig
from jllama.files import storage
from jllama.parallel import distributed
from jllama.parallel.sharding import Placement
from jllama.store.adapter import note_base
from jllama.store.model import StoredModel, read_base
from jllama.train.branch import Branch
from jllama.train.origin import check_origin, is_elsewhere, note_origin, origin
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
    branch: Branch | None = None,
) -> tuple[TrainState, Any]:
    """Returns the state, and `frozen`, the step's second argument. Every process calls it.

    The state is that of the run's checkpoint of `step`. Where `step` is 0 it is that of `branch`,
    or one whose parameters are those of `initial`, or where both are None a fresh one. `frozen` is
    the base's parameters if `config.adapt` trains an overlay, and () if not.

    Args:
      folder: the run's. What it begins with is noted there: an overlay's base in base.json, and
        other parameters in initial.json.
      initial: what `open_initial(config)` returns. To resume it is needed for an overlay, whose
        base no checkpoint holds, and to compare parameters that have moved since the run began.
      branch: what `open_branch(config)` returns. To resume it is needed to compare likewise.

    Raises `UserError` when a checkpoint or a model cannot be read, or when the base, or what has
    moved, is not what the run began with.
    """
    base, digest, frozen = (), "", ()
    if isinstance(config.adapt, LoraConfig):
        base, digest = read_base(initial, base_shapes(config, placement), base_quantizer(config))
        if branch is not None:
            branch.check_base(digest)
        model, leader = str(storage.absolute(initial.place)), distributed.leader()
        distributed.together(lambda: note_base(folder, model, digest) if leader else None)
        # A base parameter that is trained whole is in the state; the step does not need it twice.
        frozen = without_whole(base, definition.shapes.trainable)
    moved = bool(step and (branch or initial) and is_elsewhere(folder, config))
    if moved or not step:
        if branch is not None:
            state = load_state(branch.run, branch.step, definition)
        elif base and initial.adapters:
            (adapter,) = initial.adapters.values()
            _, overlay = adapter.read(config.model, placement, base, digest)
            state = start_from(definition, overlay)
        elif initial is not None and not base:
            state = start_from(definition, initial.read(definition.placed.trainable))
        else:
            state = init_state(definition, config.run.seed, base)
        if moved:
            check_origin(folder, config, state.trainable)
        if origin(config)[1]:
            note_origin(folder, config, state.trainable)
        if not step:
            return state, frozen
        del state
    return load_state(folder, step, definition), frozen
