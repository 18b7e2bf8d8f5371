"""AdamW against one in NumPy, Muon, which parameters decay, and the schedules by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
import tiny

from jllama.config import ConstantSchedule, CosineSchedule, MeshConfig, MuonConfig, WsdSchedule
from jllama.model import llama
from jllama.model.param import dotted
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.train.loss import causal_lm_loss
from jllama.train.optimizer import learning_rate, make_optimizer
from jllama.train.state import define_state, init_state
from jllama.train.step import make_train_step

DECAYED = {
    "embedding.weight",
    "layers.attention.q.kernel",
    "layers.attention.k.kernel",
    "layers.attention.v.kernel",
    "layers.attention.o.kernel",
    "layers.mlp.gate.kernel",
    "layers.mlp.up.kernel",
    "layers.mlp.down.kernel",
}
UNDECAYED = {"layers.attention_norm.scale", "layers.ffn_norm.scale", "final_norm.scale"}
QK_NORMS = {"layers.attention.q_norm.scale", "layers.attention.k_norm.scale"}


@pytest.mark.parametrize(
    ("changes", "decayed", "undecayed"),
    [
        ({}, DECAYED | {"head.weight"}, UNDECAYED),
        ({"tie_embeddings": True}, DECAYED, UNDECAYED),
        ({"qk_norm": True}, DECAYED | {"head.weight"}, UNDECAYED | QK_NORMS),
    ],
    ids=["untied", "tied", "qk_norm"],
)
def test_matrices_decay_and_norms_do_not(changes, decayed, undecayed):
    specs = llama.param_specs(tiny.config(**changes), tiny.compute())
    found = {dotted(path): spec.decay for path, spec in jax.tree.leaves_with_path(specs)}
    assert {path for path, decay in found.items() if decay} == decayed
    assert {path for path, decay in found.items() if not decay} == undecayed


class NumpyAdamW:
    """arXiv:1711.05101, algorithm 2, with clipping, in float64; trees are {path: array}."""

    def __init__(self, c, params, decayed):
        self.c, self.params, self.decayed, self.t = c, dict(params), decayed, 0
        self.m = {k: np.zeros_like(v) for k, v in params.items()}
        self.v = {k: np.zeros_like(v) for k, v in params.items()}

    def step(self, grads, rate):
        c = self.c
        self.t += 1
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            g = g * min(1.0, (c.clip_norm or np.inf) / norm)
            self.m[k] = c.beta1 * self.m[k] + (1 - c.beta1) * g
            self.v[k] = c.beta2 * self.v[k] + (1 - c.beta2) * g**2
            m = self.m[k] / (1 - c.beta1**self.t)
            v = self.v[k] / (1 - c.beta2**self.t)
            decay = c.weight_decay * self.params[k] if k in self.decayed else 0.0
            self.params[k] = self.params[k] - rate * (m / (np.sqrt(v) + c.eps) + decay)
        return norm


def by_path(tree):
    return {dotted(p): np.asarray(x, np.float64) for p, x in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("clip", ["3.0", "null"])
def test_several_steps_equal_an_independent_adamw(clip):
    # The clip lies among the norms of these steps; eps and decay are large enough to matter.
    config = recipes.in_memory(
        "training.optimizer.weight_decay=0.5",
        "training.optimizer.eps=0.001",
        f"training.optimizer.clip_norm={clip}",
    )
    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), config.sharding)
    definition = define_state(config, placement)
    state = init_state(definition, 0)._replace(trainable=tiny.params(config.model, 3.0))
    loss = functools.partial(causal_lm_loss, config)
    step = make_train_step(config, loss, definition, placement)

    @jax.jit
    def gradient(params, batch):
        def total(params):
            loss_sum, weight, _ = loss(params, (), batch, jax.random.key(0))
            return loss_sum, weight

        grads, weight = jax.grad(total, has_aux=True)(params)
        return jax.tree.map(lambda g: g / weight, grads)

    numpy = NumpyAdamW(
        config.training.optimizer, by_path(state.trainable), DECAYED | {"head.weight"}
    )
    norms = []
    for t in range(4):
        batch = recipes.batch(config, t)
        norm = numpy.step(by_path(gradient(state.trainable, batch)), RATES[t])
        state, metrics = step(state, (), placement.put_batch(batch))
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        assert float(metrics["learning_rate"]) == pytest.approx(RATES[t], rel=1e-5)
        norms.append(norm)
        for path, got in by_path(state.trainable).items():
            assert tiny.relative_error(got, numpy.params[path]) < 1e-5, path
    assert min(norms) < 3.0 < max(norms)


# Peak 0.01 after 2 steps, then half a cosine over 18 to a tenth.
RATES = [0.005, 0.01] + [
    0.01 * (0.1 + 0.9 * (1 + np.cos(np.pi * done / 18)) / 2) for done in range(1, 19)
]


def rates(schedule, steps):
    rate = learning_rate(schedule, steps)
    return [float(rate(jnp.int32(t))) for t in range(steps)]


def test_cosine_warms_up_to_the_peak_and_ends_at_the_floor():
    schedule = CosineSchedule(kind="cosine", peak=0.01, warmup_steps=2, floor=0.1)
    got = rates(schedule, 20)
    assert got == pytest.approx(RATES, rel=1e-5)
    assert got[1] == max(got) == pytest.approx(0.01)
    assert got[-1] == min(got) == pytest.approx(0.001)
    # Halfway down is the mean of peak and floor.
    assert got[10] == pytest.approx(0.0055)


def test_constant_stays_at_the_peak():
    schedule = ConstantSchedule(kind="constant", peak=0.4, warmup_steps=4)
    assert rates(schedule, 6) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    schedule = ConstantSchedule(kind="constant", peak=0.4, warmup_steps=0)
    assert rates(schedule, 2) == pytest.approx([0.4, 0.4])


def test_wsd_is_constant_and_then_falls_linearly():
    schedule = WsdSchedule(kind="wsd", peak=1.0, warmup_steps=2, decay_steps=4, floor=0.2)
    wanted = [0.5, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert rates(schedule, 8) == pytest.approx(wanted)


def newton_schulz(g):
    """Five steps of Muon's iteration with its published coefficients, for g [inputs, outputs]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / np.linalg.norm(g)
    for _ in range(5):
        xx = x @ x.T
        x = a * x + (b * xx + c * xx @ xx) @ x
    return x


def test_muon_orthogonalises_each_layers_matrices_and_leaves_the_rest_to_adam():
    model = tiny.config()
    specs = llama.param_specs(model, tiny.compute())
    config = MuonConfig(
        kind="muon", momentum=0.9, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.5, clip_norm=1e9
    )
    optimizer = make_optimizer(config, specs)
    params, grads = tiny.params(model), tiny.params(model, seed=1)
    direction, _ = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(grads, params)
    got, grads, params = by_path(direction), by_path(grads), by_path(params)
    # The number of inputs of each matrix: the model's width, the heads' for o, the MLP's for down.
    inputs = {"q": 48, "k": 48, "v": 48, "o": 64, "gate": 48, "up": 48, "down": 80}
    for path, g in grads.items():
        name = path.split(".")[-2]
        decay = 0.5 * params[path] if path in DECAYED | {"head.weight"} else 0.0
        if name not in inputs:
            wanted = g / (np.abs(g) + config.eps) + decay  # Adam's first step
            np.testing.assert_allclose(got[path], wanted, rtol=1e-4, atol=1e-4, err_msg=path)
            continue
        for layer in range(model.num_layers):
            matrix = g[layer].reshape(inputs[name], -1)
            wanted = 0.2 * max(matrix.shape) ** 0.5 * newton_schulz(matrix).reshape(g[layer].shape)
            assert tiny.relative_error(got[path][layer], wanted + decay[layer]) < 1e-3, path
