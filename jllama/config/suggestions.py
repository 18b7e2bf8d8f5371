"""What a user may have meant by a key or a model's name that does not exist."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

# Other programs' names for keys of ours. A name of ours is the end of a dotted key.
_OTHER_NAMES = {
    "peak": "lr learning_rate max_lr peak_lr base_lr",
    "floor": "min_lr end_lr final_lr",
    "schedule": "lr_schedule lr_scheduler lr_scheduler_type scheduler",
    "warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_steps",
    "training.steps": "epochs num_epochs max_epochs num_train_epochs max_steps num_steps"
    " total_steps train_steps max_iters iterations iters",
    "batch_size": "bs batch global_batch_size train_batch_size micro_batch_size"
    " per_device_batch_size per_device_train_batch_size",
    "accumulate": "grad_accum grad_accum_steps gradient_accumulation gradient_accumulation_steps"
    " accumulation_steps accumulate_grad_batches microbatches",
    "clip_norm": "grad_clip clip_grad clip_grad_norm max_grad_norm gradient_clip gradient_clipping"
    " gradient_clip_val",
    "weight_decay": "wd decay",
    "eps": "epsilon adam_eps adam_epsilon",
    "beta1": "b1 adam_beta1 betas",
    "beta2": "b2 adam_beta2",
    "optimizer": "optim opt",
    "data.length": "seq_len seq_length sequence_length max_seq_len max_seq_length block_size"
    " context_length context_size context_window",
    "model.max_length": "seq_len sequence_length max_seq_len max_seq_length block_size"
    " context_length context_size context_window",
    "num_layers": "layers n_layer n_layers depth",
    "model.num_heads": "heads n_head n_heads",
    "num_kv_heads": "kv_heads n_kv_head n_kv_heads",
    "hidden_dim": "dim d_model width embed_dim",
    "ffn_dim": "d_ff mlp_dim hidden_features",
    "rope_theta": "theta rope_base",
    "compute.dtype": "precision mixed_precision bf16 fp16",
    "remat": "gradient_checkpointing activation_checkpointing checkpoint_activations",
    "mesh.tensor": "tp tensor_parallel tensor_parallelism",
    "mesh.context": "cp context_parallel context_parallelism",
    "mesh.replica": "dp data_parallel data_parallelism",
    "adapt.rank": "r lora_r lora_rank",
    "adapt.alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "init_from": "checkpoint_path pretrained load_from",
    "checkpoint.every": "save_every save_steps save_interval checkpoint_every checkpoint_interval",
    "keep": "save_total_limit keep_last max_to_keep",
    "eval.every": "eval_every eval_steps eval_interval evaluate_every",
    "log_every": "log_interval log_steps logging_steps",
    "run.folder": "output_dir out_dir save_dir work_dir",
    "run.name": "run_name exp_name experiment",
    "run.seed": "random_seed",
    "data.train": "dataset datasets train_data train_files",
    "workers": "num_workers num_proc",
}
_MEANT: dict[str, list[str]] = {}
for _name, _others in _OTHER_NAMES.items():
    for _other in _others.split():
        _MEANT.setdefault(_other.replace("_", ""), []).append(_name)


def meant_key(path: Sequence[str], allowed: Sequence[str], keys: Mapping[str, str]) -> str:
    """A question that names the likeliest keys, or "".

    Args:
      path: the parts of the unknown key.
      allowed: the names that may stand in the place of its last part.
      keys: every dotted key of the config, and its meaning.
    """
    plain = path[-1].lower().replace("_", "")
    names = _MEANT.get(plain, [])
    if not names and (near := difflib.get_close_matches(path[-1], allowed, n=1)):
        return f"did you mean {near[0]}? "
    names = names or [key.split(".")[-1] for key in keys if _plain(key) == plain]
    matches = {k: m for k, m in keys.items() if any(f".{k}".endswith(f".{n}") for n in names)}
    matches.pop(".".join(path), None)  # a key of another kind
    shared = {key: _shared(path, key.split(".")) for key in matches}
    nearest = [key for key in matches if shared[key] == max(shared.values())]
    if not 0 < len(nearest) < 4:
        return ""
    texts = [f"{key} ({_brief(matches[key])})" for key in nearest]
    return f"did you mean {' or '.join(texts)}? "


def meant_names(name: str, choices: Collection[str]) -> list[str]:
    """The choices that are like a name: the one equal to it but for case and punctuation, or near.

    The first of several is the longest that is part of the name.
    """
    plain = {_letters(choice): choice for choice in choices}
    wanted = _letters(name)
    if wanted in plain:
        return [plain[wanted]]
    parts = sorted((part for part in plain if part in wanted), key=len)[-1:]
    near = difflib.get_close_matches(wanted, plain, n=3, cutoff=0.7)
    return [plain[letters] for letters in dict.fromkeys([*parts, *near])][:3]


def _plain(key: str) -> str:
    return key.rpartition(".")[2].replace("_", "")


def _shared(path: Sequence[str], key: Sequence[str]) -> int:
    """How many of the first parts of two keys are equal."""
    pairs = zip(path, key, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(path), len(key)))


def _brief(meaning: str) -> str:
    """A meaning without its kind, its default and what follows a semicolon."""
    return re.sub(r"^\(\w+\) | \[.*", "", meaning).partition(";")[0]


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
