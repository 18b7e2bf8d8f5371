"""Keys of Hugging Face's tokenizer_config.json and generation_config.json that are not followed.

A line on stderr names a key that is set and would change ids or texts. The lists are from
transformers 4.57.6 and 5.24.0; the table for users is in docs/interop.md.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jllama.progress import note

# What `jllama.text.settings` reads of tokenizer_config.json, without the tokens of each role.
_READ = {
    "add_bos_token", "add_eos_token", "added_tokens_decoder", "additional_special_tokens",
    "chat_template", "extra_special_tokens", "legacy", "padding_side",
}  # fmt: skip
GENERATION = "generation_config.json"
_SPACE = "add_prefix_space"
# Names, and settings of padding, of cutting and of decoding: ids are never padded or cut here, and
# decoding gives the text back as it was.
_NO_EFFECT = {
    "auto_map", "backend", "clean_up_tokenization_spaces", "errors", "fix_mistral_regex",
    "from_slow", "is_local", "local_files_only", "max_length", "model_input_names",
    "model_max_length", "name_or_path", "pad_to_multiple_of", "pad_token_type_id",
    "processor_class", "response_schema", "return_token_type_ids", "spaces_between_special_tokens",
    "special_tokens_map_file", "split_special_tokens", "stride", "tokenizer_class",
    "tokenizer_file", "transformers_version", "trust_remote_code", "truncation",
    "truncation_side", "truncation_strategy", "use_default_system_prompt", "use_fast",
}  # fmt: skip
# Settings of `generate` in transformers that change the text, with the values at which they do not.
_SAMPLING: dict[str, tuple] = {
    "temperature": (1,), "top_k": (0, 50), "top_p": (1,), "min_p": (0,), "top_h": (),
    "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "num_beams": (1,), "num_beam_groups": (1,),
    "diversity_penalty": (0,), "length_penalty": (1,), "penalty_alpha": (), "dola_layers": (),
    "guidance_scale": (1,), "bad_words_ids": ([],), "force_words_ids": ([],), "constraints": ([],),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "sequence_bias": ({},),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "exponential_decay_length_penalty": (),
    "stop_strings": ([],), "min_length": (0,), "min_new_tokens": (0,), "watermarking_config": (),
    "token_healing": (False,),
}  # fmt: skip


def note_tokenizer_keys(file: Path, config: Mapping[str, Any], roles: Collection[str]) -> None:
    """Names the keys of a tokenizer_config.json that are set and have no effect here but might.

    `roles` are the keys that name a token.
    """
    known = _READ | _NO_EFFECT | set(roles)
    unknown = {key for key in config.keys() - known - {_SPACE} if config[key]}
    if config.get(_SPACE) is False:  # the space is the default, and so no setting
        unknown.add(_SPACE)
    if unknown:
        note(f"{file}: keys that are not followed: {', '.join(sorted(unknown))}")


def note_sampling(file: Path, generation: Mapping[str, Any]) -> None:
    """Names the settings of a generation_config.json that differ from transformers' defaults."""
    told = {
        key: generation[key]
        for key, neutral in _SAMPLING.items()
        if generation.get(key) is not None and generation[key] not in neutral
    }
    if told:
        settings = ", ".join(f"{key}={value}" for key, value in told.items())
        note(f"{file}: {settings}: not followed; sampling is as the arguments say")
