"""A padded vocabulary is the same function: loss, gradients, sampling, formats."""

import dataclasses
import os
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
import tiny
from safetensors.numpy import load_file

import jllama
from jllama import flops
from jllama.cli import main
from jllama.config import AdamWConfig, MeshConfig, MuonConfig, ShardingConfig, TrainedTokenizer
from jllama.config import recipe as recipe_files
from jllama.generate import engine
from jllama.generate.engine import Request
from jllama.generate.sampling import Sampling
from jllama.interop import hf
from jllama.interop.gguf import write_gguf
from jllama.model import llama
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.store.write import write_model
from jllama.text.vocabulary import train_sentencepiece
from jllama.train.loop import train
from jllama.train.loss import causal_lm_loss
from jllama.train.optimizer import make_optimizer

PLAIN = tiny.config(vocab_size=91, num_layers=2, num_kv_heads=2, max_length=64)
PADDED = dataclasses.replace(PLAIN, vocab_multiple=32)
ROWS = 96
# A tied head is the embedding: its gradient is that of both.
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])

_ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}
OPTIMIZERS = [
    AdamWConfig(kind="adamw", **_ADAM),
    MuonConfig(kind="muon", momentum=0.95, **_ADAM),
]


def models(tied):
    return (dataclasses.replace(model, tie_embeddings=tied) for model in (PLAIN, PADDED))


def pad(params, rows=ROWS):
    """With zeros, as the package has it."""
    return {
        name: {"weight": jnp.pad(part["weight"], ((0, rows - len(part["weight"])), (0, 0)))}
        if name in ("embedding", "head")
        else part
        for name, part in params.items()
    }


@TIED
def test_fresh_parameters_are_those_of_the_plain_model_and_zeros(tied):
    plain, padded = models(tied)
    assert (plain.vocab_rows, padded.vocab_rows) == (91, ROWS)
    wanted = pad(tiny.params(plain))
    jax.tree.map(np.testing.assert_array_equal, tiny.params(padded), wanted)
    assert flops.parameter_count(padded) == flops.parameter_count(plain)
    there = sum(x.size for x in jax.tree.leaves(wanted))
    assert flops.parameter_count(padded) + flops.padding_count(padded) == there


@TIED
@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 4}, {"fsdp": 8}], ids=str)
def test_loss_and_gradients_are_the_plain_models(tied, mesh):
    plain, padded = models(tied)
    config = recipes.in_memory("training.z_loss=0.01", "compute.loss_block=40")
    config = dataclasses.replace(config, model=plain)
    params, batch = tiny.params(plain, 5.0), recipes.batch(config)

    def gradients(model, params, placement=None):
        def loss(params):
            here = dataclasses.replace(config, model=model)
            total, _, more = causal_lm_loss(here, params, (), batch, jax.random.key(0))
            return total, more

        def run(params):
            if placement is None:
                return jax.value_and_grad(loss, has_aux=True)(params)
            with placement.active():
                return jax.value_and_grad(loss, has_aux=True)(params)

        return jax.jit(run)(params)

    wanted = gradients(plain, params)
    placement, params = None, pad(params)
    if mesh:
        placement = Placement(make_mesh(MeshConfig(**{"fsdp": 1, **mesh})), ShardingConfig())
        where = llama.placed_shapes(padded, placement, "float32", "float32")
        params = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), params, where)
    (loss, more), grads = gradients(padded, params, placement)
    assert tiny.relative_error(loss, wanted[0][0]) < 1e-6
    assert tiny.relative_error(more["nll_sum"], wanted[0][1]["nll_sum"]) < 1e-6
    for got, want in zip(*map(jax.tree.leaves, (grads, pad(wanted[1]))), strict=True):
        assert tiny.relative_error(got, want) < 1e-5
    for name in grads.keys() & {"embedding", "head"}:
        assert not np.asarray(grads[name]["weight"])[91:].any()


@TIED
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.kind)
def test_padding_stays_zero_through_the_optimizer(tied, optimizer):
    plain, padded = models(tied)
    direction = make_optimizer(optimizer, llama.param_specs(padded, tiny.compute()))
    random = np.random.default_rng(0)

    @jax.jit
    def step(params, state, grads):
        updates, state = direction.update(pad(grads), state, params)
        return jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), state

    fresh = tiny.params(plain)
    params = pad(fresh)
    state = jax.jit(direction.init)(params)
    for _ in range(3):
        grads = jax.tree.map(lambda p: random.standard_normal(p.shape, np.float32), fresh)
        params, state = step(params, state, grads)
    for name in params.keys() & {"embedding", "head"}:
        table = np.asarray(params[name]["weight"])
        assert not table[91:].any() and table[:91].all()


@TIED
def test_logits_have_the_vocabulary_alone_and_sampling_draws_no_padding(tied, tmp_path):
    plain, padded = models(tied)
    params = pad(tiny.params(plain, 6.0))
    tokens = tiny.tokens(2, 9, vocab_size=91)
    got = tiny.logits(params, padded, tokens)
    assert got.shape == (2, 9, 91)
    wanted = tiny.logits(tiny.params(plain, 6.0), plain, tokens)
    assert tiny.relative_error(got, wanted) < 1e-6
    # Zeros are the likeliest rows when all others are below: they would be drawn often.
    params["final_norm"]["scale"] = 1e-3 * params["final_norm"]["scale"]
    requests = [
        Request(prompt=(1, 2), max_new_tokens=40, sampling=Sampling(temperature=5.0), number=i)
        for i in range(8)
    ]
    drawn = {t for row in engine.generate(params, padded, tiny.compute(), requests) for t in row}
    assert max(drawn) < 91 and len(drawn) > 60
    with pytest.raises(jllama.UserError, match="id 91 is not in the vocabulary of 91"):
        engine.generate(params, padded, tiny.compute(), [Request(prompt=(91,), max_new_tokens=1)])


@TIED
def test_other_formats_have_no_padding_and_ours_takes_any(tied, tmp_path, capsys):
    plain, padded = models(tied)
    params = pad(tiny.params(plain))
    write_model(tmp_path / "own", padded, params, None)
    assert main(["info", str(tmp_path / "own")]) == 0
    assert f"padding of the vocabulary           {5 * 48 * (2 - tied)}\n" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "hf")]) == 0
    config, tensors = hf.read_folder(tmp_path / "hf", os.listdir(tmp_path / "hf"))
    assert config.vocab_size == config.vocab_rows == 91
    assert tensors["model.embed_tokens.weight"].shape == (91, 48)
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "copy"), "--to", "jllama"]) == 0
    for name, wanted in (("own", params), ("copy", params), ("hf", tiny.params(plain))):
        jax.tree.map(np.testing.assert_array_equal, jllama.load(tmp_path / name).params, wanted)
    assert jllama.load(tmp_path / "own").logits([[1, 2]]).shape == (1, 2, 91)


def test_gguf_has_no_padding(tmp_path):
    model = tiny.config(vocab_size=300, vocab_multiple=64)
    tokenizer = train_sentencepiece(
        [Path(__file__).read_text()], TrainedTokenizer(kind="train", vocab_size=300)
    )
    write_gguf(tmp_path / "m.gguf", model, tiny.params(model), tokenizer, "F32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    rows = {
        t.name: int(t.shape[1])
        for t in reader.tensors
        if t.name in ("token_embd.weight", "output.weight")
    }
    assert rows == {"token_embd.weight": 300, "output.weight": 300}
    assert reader.fields["llama.vocab_size"].contents() == 300


@pytest.mark.parametrize(
    ("format", "there", "here"), [("hf", 1, 128), ("jllama", 1, 128), ("jllama", 128, 1)]
)
def test_a_run_begins_from_a_model_of_any_padding(format, there, here, tmp_path):
    model = tiny.config(
        vocab_size=320, num_layers=2, num_kv_heads=2, max_length=48, vocab_multiple=there
    )
    params = tiny.params(model)
    write = hf.write_folder if format == "hf" else write_model
    write(tmp_path / "model", model, params, None)
    text = recipes.on_disk(tmp_path / "text")
    more = [
        f"training.init_from={tmp_path / 'model'}", f"model.vocab_multiple={here}",
        "training.steps=2", "mesh.fsdp=4", "mesh.tensor=2", "training.schedule.peak=1e-30",
        "training.schedule.warmup_steps=0", f"run.folder={tmp_path / 'runs'}", "run.stop_after=1",
    ]  # fmt: skip
    config = recipe_files.load(text, more)
    assert train(config).steps == 1
    run = jllama.load(tmp_path / "runs" / "run")
    rows = config.model.vocab_rows
    plain = tiny.params(model.unpadded)
    jax.tree.map(np.testing.assert_array_equal, run.params, pad(plain, rows))


def test_an_adapter_over_a_padded_model_goes_to_peft_and_back(tmp_path):
    model = tiny.config(
        vocab_size=320, num_layers=2, num_kv_heads=2, max_length=48, vocab_multiple=128
    )
    write_model(tmp_path / "model", model, tiny.params(model), None)
    more = [
        f"model={tmp_path / 'model'}", f"training.init_from={tmp_path / 'model'}",
        "adapt={kind: lora, rank: 2, alpha: 4, full: [embedding, head]}", "training.steps=3",
        f"run.folder={tmp_path / 'runs'}",
    ]  # fmt: skip
    assert train(recipe_files.load(recipes.on_disk(tmp_path / "text"), more)).done
    run, peft, back = tmp_path / "runs" / "run", tmp_path / "peft", tmp_path / "back"
    assert main(["convert", str(run), str(peft)]) == 0
    tables = {n: x.shape for n, x in load_file(peft / "adapter_model.safetensors").items()}
    assert [s for n, s in tables.items() if "lora" not in n] == [(320, 48)] * 2
    assert main(["convert", str(peft), str(back), "--base", str(tmp_path / "model")]) == 0
    wanted, plain = jllama.load(run).logits([[5, 6, 7]]), jllama.load(tmp_path / "model")
    assert wanted.shape == (1, 3, 320)
    assert tiny.relative_error(plain.logits([[5, 6, 7]]), wanted) > 1e-3
    for adapter in (peft, back):
        got = jllama.load(tmp_path / "model", adapter=adapter).logits([[5, 6, 7]])
        assert tiny.relative_error(got, wanted) < 1e-6
