"""Instruction tuning: only replies are scored, in held-out text as in training."""

import json

import numpy as np
import pytest
import recipes

import jllama
from jllama.config import recipe as configs
from jllama.train import loop

PROMPTS = [
    (f"say {n} again:", f" {n} and {n}, as one more of {99 * n} words") for n in range(10, 40)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replies")
    path = recipes.on_disk(folder)
    for name, some in (("train", PROMPTS), ("held_out", PROMPTS[:7])):
        (folder / f"{name}.txt").write_text("\f".join(a + b for a, b in some))
    overrides = [
        "data.objective={kind: reply, after: 'again:'}", "data.packing={kind: whole}",
        "data.length=48", "training.steps=4", "eval.every=2", "tokenizer.vocab_size=300",
    ]  # fmt: skip
    return loop.train(configs.load(path, overrides))


def test_held_out_loss_is_of_replies_and_has_no_bits_per_byte(run):
    model = jllama.load(run.folder)
    found = []
    for prompt, reply in PROMPTS[:7]:
        given = model.tokenizer.encode(prompt, bos=True)
        ids = [*model.tokenizer.encode(prompt + reply, bos=True), model.tokenizer.eos_id]
        assert ids[: len(given)] == given  # the run tokenises prompt and reply together
        logits = np.asarray(model.logits(np.array([ids])), np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found += [-log_p[n - 1, ids[n]] for n in range(len(given), len(ids))]
    assert run.eval == {"loss": pytest.approx(np.mean(found), rel=1e-5)}
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]
    evals = [{key for key in line if key.startswith("eval")} for line in lines]
    assert [keys for keys in evals if keys] == [{"eval_loss"}] * 2


def test_speed_counts_prompts_and_padding_which_are_computed_too(run):
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]
    for line in lines:
        if "weight" in line:
            assert line["weight"] < 0.9 * line["computed_tokens"] == 0.9 * 8 * 48
            assert line["tokens_per_second"] == pytest.approx(8 * 48 / line["seconds"])
