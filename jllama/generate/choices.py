"""What `Llama.score` is given, as pairs of ids: a prompt, and a choice that continues it."""

from collections.abc import Sequence

from jllama.config import ModelConfig
from jllama.errors import UserError
from jllama.text.continuation import choice_ids
from jllama.text.interface import Tokenizer

# A text, or ids.
TextOrIds = str | Sequence[int]
# The ids of a prompt, and those of its choice.
Pair = tuple[list[int], list[int]]


def pairs(
    tokenizer: Tokenizer | None,
    config: ModelConfig,
    prompts: Sequence[TextOrIds],
    choices: Sequence[str] | Sequence[Sequence[TextOrIds]],
    special: bool,
) -> list[list[Pair]]:
    """For each prompt a pair for each of its choices; the arguments are those of `Llama.score`.

    Raises `UserError` as `Llama.score` does.
    """
    out = []
    for i, (prompt, several) in enumerate(zip(prompts, _lists(prompts, choices), strict=True)):
        out.append([])
        for j, choice in enumerate(several):
            where = f"prompt {i}, choice {j}"
            pair = _pair(tokenizer, prompt, choice, special, where)
            _check(pair, config, where)
            out[-1].append(pair)
    return out


def _lists(prompts, choices):
    """The choices of each prompt."""
    choices = [] if isinstance(choices, str) else list(choices)
    if choices and all(isinstance(choice, str) for choice in choices):
        return [choices] * len(prompts)
    if not choices or any(isinstance(choice, str | int) for choice in choices):
        raise UserError("choices: give a list of texts, or for each prompt a list of its choices")
    if len(choices) != len(prompts):
        raise UserError(
            f"choices: {len(choices)} lists of choices for {len(prompts)} prompts; give one list"
            " for each prompt, or texts for all of them"
        )
    return choices


def _pair(tokenizer, prompt, choice, special, where):
    if isinstance(prompt, str) != isinstance(choice, str):
        raise UserError(f"{where}: one is a text and one is ids; give texts, or give ids")
    if tokenizer is None and (isinstance(prompt, str) or not len(prompt)):
        raise UserError(
            "score: the model has no tokenizer; load it with one (tokenizer=PATH), or give ids"
        )
    if isinstance(prompt, str):
        # Without the choice, white space that moves to it would be scored alone.
        return choice_ids(tokenizer, prompt, choice, special) if choice else ([], [])
    return [int(i) for i in prompt] or [tokenizer.bos_id], [int(i) for i in choice]


def _check(pair, config, where):
    before, after = pair
    ids = before + after
    if not after:
        raise UserError(f"{where}: the choice is empty, which has no probability; leave it out")
    if bad := [i for i in ids if not 0 <= i < config.vocab_size]:
        raise UserError(f"{where}: id {bad[0]} is not in the vocabulary of {config.vocab_size}")
    if len(ids) > config.max_length:
        raise UserError(
            f"{where}: {len(before)} tokens and {len(after)} of the choice exceed the model's"
            f" max_length={config.max_length}: shorten the prompt"
        )
