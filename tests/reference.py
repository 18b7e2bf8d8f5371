"""LLaMA in plain float64 NumPy, from the papers: slow, short, and independent of jllama.model.

Of jllama it knows the names in the config and the layout of the parameter tree, and nothing else.
"""

import numpy as np


def logits(params, config, tokens, positions=None, segments=None, length=None):
    """tokens [B,T] -> float64 logits [B,T,V].

    positions [B,T] turn RoPE (default 0..T-1); position t of a row attends to itself and to what
    precedes it in the row under the same number in segments [B,T] (default one segment). RoPE that
    depends on the length of the text takes `length` (default T).
    """
    tokens = np.asarray(tokens)
    length = tokens.shape[1] if length is None else length
    if positions is None:
        positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    if segments is None:
        segments = np.zeros_like(tokens)
    params = _float64(params)
    rows = zip(tokens, positions, segments, strict=True)
    return np.stack([_row(params, config, *row, length) for row in rows])


def growing(params, config, prompt, count):
    """`count` greedy tokens over a cache of keys that are turned anew for each length."""
    c, params = config, _float64(params)
    cache = [([], []) for _ in range(c.num_layers)]

    def read(tokens, first):
        """The logits after `tokens` at positions from `first` on, of which the cache has keys."""
        positions = np.arange(first, first + len(tokens))
        length = first + len(tokens)
        x = params["embedding"]["weight"][tokens]
        for layer, (ks, vs) in enumerate(cache):
            p = _pick(params["layers"], layer)
            h = _norm(x, p["attention_norm"]["scale"], c)
            a = p["attention"]
            ks.extend(np.einsum("td,dkn->tkn", h, a["k"]["kernel"]))
            vs.extend(np.einsum("td,dkn->tkn", h, a["v"]["kernel"]))
            for head in range(c.num_heads):
                shared = head * c.num_kv_heads // c.num_heads
                k = _turned(np.array(ks)[:, shared], _rotations(c, np.arange(length), length))
                q = _turned(h @ a["q"]["kernel"][:, head], _rotations(c, positions, length))
                scores = q @ k.T / np.sqrt(c.head_dim)
                scores[np.arange(length)[None] > positions[:, None]] = -np.inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                x = x + weights @ np.array(vs)[:, shared] @ a["o"]["kernel"][head]
            h = _norm(x, p["ffn_norm"]["scale"], c)
            gate, up = h @ p["mlp"]["gate"]["kernel"], h @ p["mlp"]["up"]["kernel"]
            x = x + (gate / (1 + np.exp(-gate)) * up) @ p["mlp"]["down"]["kernel"]
        x = _norm(x[-1], params["final_norm"]["scale"], c)
        return x @ params["embedding" if c.tie_embeddings else "head"]["weight"].T

    out, tokens, first = [], list(prompt), 0
    for _ in range(count):
        out.append(int(read(np.array(tokens), first).argmax()))
        tokens, first = out[-1:], len(prompt) + len(out) - 1
    return out


def cross_entropy(hidden, weight, targets, weights, z_loss):
    """Loss with and without the z term, and the gradients of the first, all in float64."""
    h, w = hidden.astype(np.float64), weight.astype(np.float64)
    logits = h @ w.T
    top = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
    onehot = np.eye(len(w))[targets]
    nll = (weights * (log_z[..., 0] - (logits * onehot).sum(-1))).sum()
    loss = nll + z_loss * (weights * log_z[..., 0] ** 2).sum()
    p = np.exp(logits - log_z)
    d_logits = weights[..., None] * (p * (1 + 2 * z_loss * log_z) - onehot)
    return loss, nll, d_logits @ w, np.einsum("btv,btd->vd", d_logits, h)


def _float64(tree):
    if isinstance(tree, dict):
        return {name: _float64(branch) for name, branch in tree.items()}
    return np.asarray(tree).astype(np.float64)


def _row(params, c, tokens, positions, segments, length):
    x = params["embedding"]["weight"][tokens]
    turn = _rotations(c, positions, length)
    allowed = np.tril(np.ones((len(tokens),) * 2, bool)) & (segments[:, None] == segments[None])
    for layer in range(c.num_layers):
        p = _pick(params["layers"], layer)
        x = x + _attention(
            p["attention"], c, _norm(x, p["attention_norm"]["scale"], c), turn, allowed
        )
        h = _norm(x, p["ffn_norm"]["scale"], c)
        gate, up = h @ p["mlp"]["gate"]["kernel"], h @ p["mlp"]["up"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p["mlp"]["down"]["kernel"]
    x = _norm(x, params["final_norm"]["scale"], c)
    return x @ params["embedding" if c.tie_embeddings else "head"]["weight"].T


def _pick(tree, layer):
    if isinstance(tree, dict):
        return {name: _pick(branch, layer) for name, branch in tree.items()}
    return tree[layer]


def _norm(x, scale, c):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps) * scale


def _attention(p, c, x, turn, allowed):
    out = np.zeros_like(x)
    for head in range(c.num_heads):
        # Grouped queries: consecutive query heads share a key/value head.
        shared = head * c.num_kv_heads // c.num_heads
        q = x @ p["q"]["kernel"][:, head]
        k = x @ p["k"]["kernel"][:, shared]
        v = x @ p["v"]["kernel"][:, shared]
        if c.qk_norm:
            q, k = _norm(q, p["q_norm"]["scale"], c), _norm(k, p["k_norm"]["scale"], c)
        scores = _turned(q, turn) @ _turned(k, turn).T / np.sqrt(c.head_dim)
        scores = np.where(allowed, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out += weights @ v @ p["o"]["kernel"][head]
    return out


def _turned(x, turn):
    """RoPE as multiplication of complex numbers: pair i is dimensions i and i + N/2."""
    half = x.shape[-1] // 2
    z = (x[:, :half] + 1j * x[:, half:]) * turn
    return np.concatenate([z.real, z.imag], -1)


def _rotations(c, positions, length):
    turn = np.exp(1j * np.asarray(positions, np.float64)[:, None] * frequencies(c, length))
    if c.rope.kind == "yarn":
        default = 1 + np.log(c.rope.factor) / 10
        turn = turn * (c.rope.attention_factor or default)
    return turn


def frequencies(c, length=None):
    """Radians per position of each pair, by a loop over the pairs; `length` is the whole text's."""
    out, d, s = [], c.head_dim, c.rope
    for pair in range(d // 2):
        theta = c.rope_theta
        if s.kind == "ntk":
            theta *= s.alpha ** (d / (d - 2))
        elif s.kind == "dynamic" and length > s.original_length:
            theta *= (s.factor * length / s.original_length - (s.factor - 1)) ** (d / (d - 2))
        elif s.kind == "adaptive" and length > s.original_length:
            theta *= ((length / (s.original_length / 2) - 1) * s.coefficient) ** (d / (d - 2))
        f = theta ** (-2.0 * pair / d)
        if s.kind in ("linear", "adaptive"):
            f = f / s.factor
        elif s.kind == "yarn":
            ends = [
                d * np.log(s.original_length / (turns * 2 * np.pi)) / (2 * np.log(c.rope_theta))
                for turns in (s.beta_fast, s.beta_slow)
            ]
            if s.truncate:
                ends = [np.floor(ends[0]), np.ceil(ends[1])]
            low, high = max(ends[0], 0), min(ends[1], d - 1)
            high += 0.001 if low == high else 0
            ramp = min(max((pair - low) / (high - low), 0), 1)
            f = f * (1 - ramp) + f / s.factor * ramp
        elif s.kind == "llama3":
            wavelength = 2 * np.pi / f
            if wavelength > s.original_length / s.low_freq_factor:
                f = f / s.factor
            elif wavelength >= s.original_length / s.high_freq_factor:
                t = s.original_length / wavelength - s.low_freq_factor
                t = t / (s.high_freq_factor - s.low_freq_factor)
                f = f * ((1 - t) / s.factor + t)
        else:
            assert s.kind in ("none", "ntk", "dynamic"), s.kind
        out.append(f)
    return np.array(out)
