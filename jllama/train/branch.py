"""Beginning a run from the whole state of another one: `training.resume_from`."""

import dataclasses
import operator
from pathlib import Path

from jllama.adapt.lora import layout
from jllama.config import Config, HeldOutShare, LoraConfig
from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.files import storage
from jllama.parallel import distributed
from jllama.progress import say
from jllama.store.adapter import differences, read_base_note
from jllama.store.find import CHECKPOINTS, RECIPE, complete_steps


@dataclasses.dataclass(frozen=True)
class Branch:
    """The step of another run whose state a run begins from.

    Attributes:
      run: that run's folder; its tokenizer is the new run's, as its parameters know those ids.
      step: that run's step, and the new run's first: schedule and data go on from it.
    """

    run: Path
    step: int

    def __str__(self) -> str:
        return f"{self.run}@{self.step}"

    def check_base(self, digest: str) -> None:
        """Raises UserError unless an overlay's base has the fingerprint of that run's base."""
        model, theirs = read_base_note(self.run)
        if theirs != digest:
            raise UserError(
                f"training.resume_from={self}: its overlay is over other parameters"
                f" ({model}) than those of training.init_from; name that model there"
            )


def open_branch(config: Config) -> Branch | None:
    """The step that `training.resume_from` names, RUN@STEP; None where it is empty.

    Raises UserError for a step that is not there, and for one whose state is not the recipe's:
    other parameters, another kind of optimizer, or another overlay.
    """
    where = config.training.resume_from
    if not where:
        return None
    name, _, step = where.rpartition("@")
    run, step = storage.path(name), int(step)
    try:
        return _open(config, run, step)
    except UserError as e:
        raise type(e)(f"training.resume_from={where}: {e}") from None


def _open(config: Config, run: Path, step: int) -> Branch:
    if not storage.exists(run / RECIPE):
        raise UserError("no such run: it has no config.yaml; write RUN@STEP")
    steps = complete_steps(run / CHECKPOINTS)
    if step not in steps:
        listed = ", ".join(map(str, steps)) or "none"
        raise UserError(f"no such checkpoint; the run has: {listed}")
    if step >= config.training.steps:
        raise UserError(
            f"the run would be complete; raise training.steps={config.training.steps}, which counts"
            " from that run's first step"
        )
    theirs = recipes.load(run / RECIPE)
    shapes_differ, lines = differences(theirs.model, config.model)
    if shapes_differ:
        raise UserError(f"its parameters are not the recipe's model: {'; '.join(lines)}")
    for key in ("compute.param_dtype", "adapt.kind", "training.optimizer.kind"):
        ours, before = (operator.attrgetter(key)(x) for x in (config, theirs))
        if ours != before:
            raise UserError(f"its state is not the recipe's: {key} is {ours}, there {before}")
    if isinstance(config.adapt, LoraConfig):
        overlays = [layout(x.model, x.adapt) for x in (config, theirs)]
        for path in sorted({path for overlay in overlays for path in overlay}):
            ours, before = (overlay.get(path, "is frozen") for overlay in overlays)
            if ours != before:
                raise UserError(f"its overlay is not the recipe's: {path} {ours}, there {before}")
    held_out = theirs.data.held_out, config.data.held_out
    if held_out[0] != held_out[1] and any(isinstance(x, HeldOutShare) for x in held_out):
        lines.append("data.held_out is another: that run may have trained on what is held out here")
    if distributed.leader():
        for line in lines:
            say(f"note: training.resume_from={run}@{step}: {line}")
    return Branch(run, step)
