"""What fresh parameters are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jllama.config import FanInInit, TruncatedNormalInit
from jllama.model import llama

# The standard deviation of a standard normal that is cut at two: numerically, here.
_X = np.linspace(-2, 2, 400_001)
CUT = float(np.sqrt((_X**2 * np.exp(-(_X**2) / 2)).sum() / np.exp(-(_X**2) / 2).sum()))


def init(kind, **changes):
    model = tiny.config(
        vocab_size=512, hidden_dim=96, head_dim=32, ffn_dim=192, init=kind, **changes
    )
    params = jax.jit(llama.init_params, static_argnums=(0, 1))(
        model, tiny.compute(), jax.random.key(0)
    )
    layers = params["layers"]
    return params | {"attention": layers["attention"], "mlp": layers["mlp"]}


def std(tree, *path):
    for name in path:
        tree = tree[name]
    assert abs(float(jnp.mean(tree))) < 0.05 * float(jnp.std(tree))
    return float(jnp.std(tree))


def test_cut_leaves_088_of_the_standard_deviation():
    assert pytest.approx(0.88, abs=0.001) == CUT


@pytest.mark.parametrize("scale_residual", [True, False])
def test_truncated_normal(scale_residual):
    kind = TruncatedNormalInit(kind="truncated_normal", std=0.02, scale_residual=scale_residual)
    p = init(kind)
    plain = pytest.approx(0.02 * CUT, rel=0.02)
    outputs = pytest.approx(0.02 * CUT / (6**0.5 if scale_residual else 1), rel=0.02)
    for name in "qkv":
        assert std(p, "attention", name, "kernel") == plain
    assert std(p, "mlp", "gate", "kernel") == plain
    assert std(p, "mlp", "up", "kernel") == plain
    assert std(p, "embedding", "weight") == plain
    assert std(p, "head", "weight") == plain
    assert std(p, "attention", "o", "kernel") == outputs
    assert std(p, "mlp", "down", "kernel") == outputs
    assert float(jnp.abs(p["head"]["weight"]).max()) <= 0.04
    assert float(jnp.abs(p["head"]["weight"]).max()) > 0.0399


@pytest.mark.parametrize("scale_residual", [True, False])
def test_fan_in(scale_residual):
    p = init(FanInInit(kind="fan_in", embedding_std=0.5, scale_residual=scale_residual))
    residual = 6**0.5 if scale_residual else 1
    assert std(p, "embedding", "weight") == pytest.approx(0.5 * CUT, rel=0.02)
    assert std(p, "head", "weight") == pytest.approx(0.5 * CUT, rel=0.02)
    assert std(p, "attention", "q", "kernel") == pytest.approx(96**-0.5 * CUT, rel=0.02)
    assert std(p, "mlp", "up", "kernel") == pytest.approx(96**-0.5 * CUT, rel=0.02)
    o, down = 128**-0.5 * CUT / residual, 192**-0.5 * CUT / residual
    assert std(p, "attention", "o", "kernel") == pytest.approx(o, rel=0.02)
    assert std(p, "mlp", "down", "kernel") == pytest.approx(down, rel=0.02)


def test_norm_scales_begin_at_one_and_layers_differ():
    p = init(tiny.FAN_IN, qk_norm=True)
    for scale in (p["final_norm"], p["attention"]["q_norm"], p["layers"]["ffn_norm"]):
        assert (scale["scale"] == 1).all()
    q = p["attention"]["q"]["kernel"]
    assert not (q[0] == q[1]).any()
    assert not (q == p["attention"]["k"]["kernel"]).any()


def test_parameters_have_the_documented_layout_and_dtype():
    model = tiny.config(num_kv_heads=2, qk_norm=True)
    specs = llama.param_specs(model, tiny.compute(param_dtype="bfloat16"))
    shapes = {
        "/".join(k.key for k in path): (leaf.shape, leaf.dtype.name, len(leaf.axes))
        for path, leaf in jax.tree.leaves_with_path(specs)
    }
    attention = {"q": (48, 4, 16), "k": (48, 2, 16), "v": (48, 2, 16), "o": (4, 16, 48)}
    mlp = {"gate": (48, 80), "up": (48, 80), "down": (80, 48)}
    wanted = {"embedding/weight": (97, 48), "head/weight": (97, 48), "final_norm/scale": (48,)}
    wanted |= {f"layers/attention/{n}/kernel": (3, *s) for n, s in attention.items()}
    wanted |= {f"layers/mlp/{n}/kernel": (3, *s) for n, s in mlp.items()}
    wanted |= {f"layers/{n}/scale": (3, 48) for n in ("attention_norm", "ffn_norm")}
    wanted |= {f"layers/attention/{n}/scale": (3, 16) for n in ("q_norm", "k_norm")}
    assert shapes == {path: (shape, "bfloat16", len(shape)) for path, shape in wanted.items()}


def test_tied_model_has_no_head():
    specs = llama.param_specs(tiny.config(tie_embeddings=True), tiny.compute())
    assert "head" not in specs
    assert "head" in llama.param_specs(tiny.config(), tiny.compute())


def test_specs_are_traced_once_and_each_caller_has_its_own(monkeypatch):
    model, traced = tiny.config(vocab_size=77), []
    trace = llama._init_boxed
    monkeypatch.setattr(llama, "_init_boxed", lambda *args: traced.append(args) or trace(*args))
    first = llama.param_specs(model, tiny.compute())
    whole = dict(first)
    del first["head"]
    assert llama.param_specs(model, tiny.compute(remat="full")) == whole
    narrow = llama.param_specs(model, tiny.compute(param_dtype="bfloat16"))
    assert narrow["head"]["weight"].dtype == jnp.bfloat16
    assert len(traced) == 2
