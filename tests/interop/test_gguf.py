"""GGUF files, read back with the gguf library: every tensor, every key, nothing half-written."""

import base64
import dataclasses
import errno
import json
import struct
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import reference
import tiktoken
import tiny
import tokenizers

from jllama.config import MeshConfig, ShardingConfig, TrainedTokenizer
from jllama.errors import StorageError, UserError
from jllama.interop.gguf import KINDS, write_gguf
from jllama.interop.gguf_vocabulary import vocabulary_of
from jllama.model import llama
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.text.added import AddedToken
from jllama.text.llama3 import PATTERN
from jllama.text.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, TiktokenTokenizer
from jllama.text.tokenizer_json import spell
from jllama.text.vocabulary import train_sentencepiece

VOCAB = 384
ROWS = 400  # the model's: more than the tokenizer's
REFUSED = ("dynamic", "adaptive-1", "adaptive-2", "qk-norm")
VARIANTS = [name for name in tiny.VARIANTS if name not in REFUSED]
TEXT = Path(__file__).read_text() * 2
GGUF_NAMES = {  # written out here, beside the table in jllama.interop.names
    "attention_norm.scale": "attn_norm",
    "attention.q.kernel": "attn_q",
    "attention.k.kernel": "attn_k",
    "attention.v.kernel": "attn_v",
    "attention.o.kernel": "attn_output",
    "ffn_norm.scale": "ffn_norm",
    "mlp.gate.kernel": "ffn_gate",
    "mlp.up.kernel": "ffn_up",
    "mlp.down.kernel": "ffn_down",
}
# Largest error of a block: in steps between its levels, and what float16 rounds of its scale.
LEVELS = {"Q8_0": 127, "Q5_1": 31 / 2, "Q5_0": 16, "Q4_1": 15 / 2, "Q4_0": 8, "MXFP4": 4}


def config(**changes):
    return tiny.config(**{"vocab_size": ROWS, **changes})


@pytest.fixture(scope="module")
def tokenizer():
    wanted = TrainedTokenizer(kind="train", vocab_size=VOCAB)
    return train_sentencepiece([TEXT], wanted)


@pytest.fixture(scope="module")
def llama3():
    """A tiktoken file of single bytes, last first, and a hundred pieces of this file's words."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    letters = {spell(bytes([byte])): bytes([byte]) for byte in reversed(range(256))}
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=356, initial_alphabet=list(letters), show_progress=False
    )
    model.train_from_iterator([TEXT], trainer)
    learnt = sorted(model.get_vocab().items(), key=lambda item: item[1])[256:]
    pieces = list(letters.values())
    pieces += [b"".join([letters[letter] for letter in piece]) for piece, _ in learnt]
    lines = [base64.b64encode(p) + b" %d\n" % rank for rank, p in enumerate(pieces)]
    return TiktokenTokenizer(b"".join(lines))


def write(path, model, params, tokenizer, kind="F32"):
    write_gguf(path, model, params, tokenizer, kind)
    return gguf.GGUFReader(path)


def fields(reader):
    return {name: field.contents() for name, field in reader.fields.items()}


def tensors(reader):
    """Values [outputs, inputs] by name, as llama.cpp would compute with them."""
    out = {}
    for t in reader.tensors:
        values = gguf.dequantize(t.data, t.tensor_type).astype(np.float32)
        out[t.name] = values.reshape(t.shape.tolist()[::-1])
    return out


def ours(file, model, path):
    """A layer's tensor as this package has it, undone element by element."""
    if path.endswith("scale"):
        return file
    D, N = model.hidden_dim, model.head_dim
    if path.endswith(("gate.kernel", "up.kernel", "down.kernel")):
        return file.T
    if path == "attention.o.kernel":
        return file.T.reshape(model.num_heads, N, D)
    heads = file.shape[0] // N
    out = np.empty((D, heads, N), np.float32)
    for head in range(heads):
        for i in range(N):
            turned = path in ("attention.q.kernel", "attention.k.kernel")
            # The file's rows 2i and 2i + 1 of a head are the pair that turns together.
            row = (2 * i if i < N // 2 else 2 * (i - N // 2) + 1) if turned else i
            out[:, head, i] = file[head * N + row]
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_is_written_in_llama_cpps_layout(name, tokenizer, tmp_path):
    model = config(**tiny.VARIANTS[name])
    params = tiny.params(model)
    found = tensors(write(tmp_path / "model.gguf", model, params, tokenizer))
    wanted = {"token_embd.weight": params["embedding"]["weight"]}
    wanted["output_norm.weight"] = params["final_norm"]["scale"]
    if not model.tie_embeddings:
        wanted["output.weight"] = params["head"]["weight"]
    for key, array in wanted.items():
        np.testing.assert_array_equal(found.pop(key), array)
    factors = found.pop("rope_freqs.weight", None)
    for path, key in GGUF_NAMES.items():
        leaf = params["layers"]
        for part in path.split("."):
            leaf = leaf[part]
        for layer in range(model.num_layers):
            file = found.pop(f"blk.{layer}.{key}.weight")
            np.testing.assert_array_equal(ours(file, model, path), leaf[layer])
    assert not found
    plain = model.rope_theta ** -(np.arange(0, 16, 2) / 16)
    if model.rope.kind == "llama3":
        np.testing.assert_allclose(plain / factors, reference.frequencies(model), rtol=1e-6)
        assert factors[-1] == model.rope.factor and factors[0] == 1
    else:
        assert factors is None


def test_metadata(tokenizer, tmp_path):
    model = config(rope=tiny.LINEAR, num_kv_heads=2, rope_theta=5e5, rms_norm_eps=1e-6)
    found = fields(write(tmp_path / "small.gguf", model, tiny.params(model), tokenizer, "Q8_0"))
    wanted = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "small",
        "general.size_label": "101K",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.vocab_size": ROWS,
        "llama.context_length": 2048,
        "llama.embedding_length": 48,
        "llama.block_count": 3,
        "llama.feed_forward_length": 80,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5e5,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
    }
    own = {k: v for k, v in found.items() if k.startswith(("general.", "llama."))}
    assert own == wanted


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        (tiny.NTK, {"freq_base": np.float32(1e4 * 4 ** (16 / 14))}),
        (
            tiny.YARN,
            {
                "freq_base": 1e4,
                "scaling.type": "yarn",
                "scaling.factor": 8.0,
                "scaling.original_context_length": 256,
            },
        ),
        (
            dataclasses.replace(tiny.YARN, attention_factor=1.5),
            {"scaling.attn_factor": np.float32(1.5 / (1 + 0.1 * np.log(8)))},
        ),
    ],
    ids=["ntk", "yarn", "yarn, attention factor"],
)
def test_scaling_in_the_metadata(rope, wanted, tokenizer, tmp_path):
    model = config(rope=rope)
    found = fields(write(tmp_path / "model.gguf", model, tiny.params(model), tokenizer))
    own = {k.removeprefix("llama.rope."): v for k, v in found.items() if ".rope." in k}
    assert own.pop("dimension_count") == 16
    if "scaling.attn_factor" in wanted:
        own = {k: v for k, v in own.items() if k in wanted}
    assert own == wanted


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        (tiny.DYNAMIC, r"model\.rope\.kind=dynamic: .*choose ntk"),
        (tiny.ADAPTIVE1, r"model\.rope\.kind=adaptive: .*choose ntk"),
        (dataclasses.replace(tiny.YARN, truncate=False), r"model\.rope\.truncate=False: .*True"),
        (dataclasses.replace(tiny.YARN, beta_fast=16.0), r"model\.rope\.beta_fast=16.0: .*32.0"),
        (dataclasses.replace(tiny.YARN, beta_slow=2.0), r"model\.rope\.beta_slow=2.0: .*1.0"),
    ],
    ids=["dynamic", "adaptive", "truncate", "beta_fast", "beta_slow"],
)
def test_a_scaling_that_llama_cpp_lacks_is_refused(rope, said, tokenizer, tmp_path):
    model = config(rope=rope)
    with pytest.raises(UserError, match=said):
        write(tmp_path / "model.gguf", model, tiny.params(model), tokenizer)
    assert not list(tmp_path.iterdir())


def test_the_file_is_the_same_from_a_mesh(tokenizer, tmp_path):
    model = config(num_kv_heads=2)
    params = tiny.params(model)
    placed = Placement(make_mesh(MeshConfig(fsdp=4, tensor=2)), ShardingConfig())
    shapes = llama.placed_shapes(model, placed, "float32", "float32")
    spread = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), params, shapes)
    assert len(spread["head"]["weight"].sharding.device_set) == 8
    for where, tree in (("one", params), ("mesh", spread)):
        (tmp_path / where).mkdir()
        write(tmp_path / where / "model.gguf", model, tree, tokenizer, "Q8_0")
    one, mesh = (tmp_path / where / "model.gguf" for where in ("one", "mesh"))
    assert one.read_bytes() == mesh.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_errors_stay_within_the_steps_of_each_kind(kind, tokenizer, tmp_path):
    model = config(hidden_dim=64, ffn_dim=96)
    params = tiny.params(model)
    exact = tensors(write(tmp_path / "exact.gguf", model, params, tokenizer))
    reader = write(tmp_path / "model.gguf", model, params, tokenizer, kind.lower())
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    for key, values in tensors(reader).items():
        if "norm" in key:
            assert types[key] == "F32"
            np.testing.assert_array_equal(values, exact[key])
            continue
        table = key in ("token_embd.weight", "output.weight")
        assert types[key] == ("Q8_0" if table and kind in LEVELS else kind)
        error = np.abs(values - exact[key])
        if kind in LEVELS:
            blocks = exact[key].reshape(-1, 32)
            largest = spread = np.abs(blocks).max(1, keepdims=True)
            if types[key] in ("Q5_1", "Q4_1"):
                spread = (blocks.max(1, keepdims=True) - blocks.min(1, keepdims=True)) / 2
            # A whole step at the far end of kinds without a level there, else half a step.
            steps = 1 if types[key] in ("Q5_0", "Q4_0", "MXFP4") else 0.5
            bound = spread * steps / LEVELS[types[key]] + largest * 2**-10
            assert (error.reshape(-1, 32) <= bound).all()
            assert error.max() > 0
        else:
            bits = {"F32": 24, "F16": 11, "BF16": 8}[kind]
            assert (error <= np.abs(exact[key]) * 2.0**-bits + 2.0**-25).all()


def test_bfloat16_parameters_are_written_exactly(tokenizer, tmp_path):
    model = config()
    params = jax.tree.map(lambda x: x.astype("bfloat16"), tiny.params(model))
    found = tensors(write(tmp_path / "model.gguf", model, params, tokenizer, "BF16"))
    wanted = np.asarray(params["head"]["weight"]).astype(np.float32)
    np.testing.assert_array_equal(found["output.weight"], wanted)


def test_rows_that_do_not_divide_into_blocks_are_f16(tokenizer, tmp_path, capsys):
    model = config(hidden_dim=64)  # the down projection's rows are 80 wide
    reader = write(tmp_path / "model.gguf", model, tiny.params(model), tokenizer, "Q4_0")
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q4_0"
    assert "3 of 30 tensors are F16" in (said := capsys.readouterr().err)
    assert "blk.0.ffn_down.weight" in said


def test_blocks_of_vanishing_weights_are_zeros(tokenizer, tmp_path):
    model = config(hidden_dim=64, ffn_dim=96)
    params = tiny.params(model)
    up = params["layers"]["mlp"]["up"]
    # By NumPy, for XLA makes zeros of such numbers itself.
    up["kernel"] = jax.numpy.asarray(np.asarray(up["kernel"]) * np.float32(1e-37))
    assert np.asarray(up["kernel"]).any()
    for kind in LEVELS:
        found = tensors(write(tmp_path / f"{kind}.gguf", model, params, tokenizer, kind))
        assert not found["blk.1.ffn_up.weight"].any()


# ------------------------------------------------------------------------------------ tokenizers


def test_sentencepiece_vocabulary(tokenizer, tmp_path):
    model = config()
    found = fields(write(tmp_path / "model.gguf", model, tiny.params(model), tokenizer))
    sp = tokenizer._sp
    tokens = found["tokenizer.ggml.tokens"]
    types = found["tokenizer.ggml.token_type"]
    scores = found["tokenizer.ggml.scores"]
    assert len(tokens) == len(types) == len(scores) == ROWS
    users = 0
    for i in range(VOCAB):
        user = not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i)) and types[i] != 1
        users += user
        text = sp.id_to_piece(i)
        assert tokens[i] == (text.replace("\u2581", " ") if user else text)
        assert scores[i] == sp.get_score(i)
        kind = 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
        assert types[i] == (4 if user else kind)
        assert not user or tokens[i].startswith("\n")
    assert users  # line breaks with indentation
    assert tokens[VOCAB:] == [f"[PAD{i}]" for i in range(VOCAB, ROWS)]
    assert set(types[VOCAB:]) == {5}
    wanted = {
        "model": "llama",
        "pre": "default",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": False,
    }
    assert {k: found[f"tokenizer.ggml.{k}"] for k in wanted} == wanted
    assert "tokenizer.ggml.padding_token_id" not in found


def test_tokens_added_to_sentencepiece(tokenizer):
    added = [AddedToken("<x>", VOCAB + 1), AddedToken("<y>", VOCAB + 2, special=False)]
    made = vocabulary_of(SentencePieceTokenizer(tokenizer.model, added=added), ROWS)
    assert made.tokens[VOCAB : VOCAB + 4] == [f"[PAD{VOCAB}]", "<x>", "<y>", f"[PAD{VOCAB + 3}]"]
    assert made.types[VOCAB : VOCAB + 4] == [5, 3, 4, 5]


def test_a_token_that_ends_a_text_is_the_end_of_a_turn(tokenizer):
    added = [AddedToken("<|im_end|>", VOCAB)]
    made = SentencePieceTokenizer(tokenizer.model, added=added, stop_ids=[VOCAB])
    assert vocabulary_of(made, ROWS).ids["eot"] == VOCAB


def test_llama3_vocabulary(llama3, tmp_path):
    model = config(vocab_size=llama3.vocab_size)
    found = fields(write(tmp_path / "model.gguf", model, tiny.params(model), llama3))
    found = {k.removeprefix("tokenizer.ggml."): v for k, v in found.items()}
    tokens, types, n = found["tokens"], found["token_type"], len(llama3.ranks)
    assert tokens[n : n + 2] == ["<|begin_of_text|>", "<|end_of_text|>"]
    assert types == [1] * n + [3] * 256
    ids = [found[f"{role}_token_id"] for role in ("bos", "eos", "eot", "eom", "padding")]
    assert ids == [n, n + 1, n + 9, n + 8, n + 4]
    assert (found["model"], found["pre"]) == ("gpt2", "llama-bpe")
    assert "scores" not in found and "add_space_prefix" not in found
    # Tokens and merges are whole and in order: as a tokenizer.json they give the same ids.
    again = tokenizers.Tokenizer.from_str(json.dumps(llama3_json(tokens[:n], found["merges"])))
    exact = tiktoken.Encoding("", pat_str=PATTERN, mergeable_ranks=llama3.ranks, special_tokens={})
    for text in [TEXT, "  \n\n é 👍🏽 \x00 'LL 12345", "eeeeeeeee" * 5, "ſ\u2028 end\r\n"]:
        assert again.encode(text).ids == exact.encode_ordinary(text)


def llama3_json(tokens, merges, added=()):
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"}
    split["invert"] = False
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level["use_regex"] = False
    return {
        "version": "1.0",
        "added_tokens": [AddedToken(t, i).to_json() | {"id": i} for t, i in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": merges,
            "ignore_merges": True,
        },
    }


def test_tokenizer_json_of_llama3_is_its_tiktoken_file(llama3):
    wanted = vocabulary_of(llama3, 700)
    pieces = [spell(piece) for piece in llama3.ranks]
    json = llama3_json(pieces, wanted.merges, llama3.special_tokens.items())
    assert vocabulary_of(HuggingFaceTokenizer(json), 700) == wanted


def sentencepiece_json(tokenizer):
    """A tokenizer.json of the same pieces, as Hugging Face's converter makes one."""
    vocab = {piece: id for id, piece in enumerate(tokenizer.pieces)}
    scores = {piece: tokenizer._sp.get_score(id) for piece, id in vocab.items()}
    merges = []
    for piece in vocab:
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [(-scores[piece], vocab[a], vocab[b], a, b)
                   for a, b in pairs if a in vocab and b in vocab]  # fmt: skip
    decoders = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    normalizers = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    added = [AddedToken(tokenizer.pieces[id], id).to_json() | {"id": id} for id in range(3)]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [list(m[3:]) for m in sorted(merges)],
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def test_tokenizer_json_like_sentencepiece_merges_in_the_same_order(tokenizer):
    wanted = vocabulary_of(tokenizer, ROWS)
    made = vocabulary_of(HuggingFaceTokenizer(sentencepiece_json(tokenizer)), ROWS)
    assert (made.model, made.space_prefix, made.ids) == ("llama", True, wanted.ids)
    merged = [i for i in range(ROWS) if made.scores[i] > -1000 and wanted.types[i] == 1]
    assert len(merged) > 50
    order = sorted(merged, key=made.scores.__getitem__)
    assert order == sorted(merged, key=wanted.scores.__getitem__)
    for i in range(ROWS):
        if wanted.types[i] != 4:  # tokenizer.json has none of these
            assert (made.tokens[i], made.types[i]) == (wanted.tokens[i], wanted.types[i])


def test_tokens_that_another_file_adds_are_in_the_vocabulary(tokenizer):
    file, n = sentencepiece_json(tokenizer), tokenizer.vocab_size
    file["added_tokens"].append(AddedToken("<z>", n + 2, special=False).to_json() | {"id": n + 2})
    beside = [AddedToken("<vis>", n, special=False)]  # in the hole below <z>
    made = vocabulary_of(HuggingFaceTokenizer(file, added=beside), n + 3)
    assert (made.tokens[n], made.types[n]) == ("<vis>", gguf.TokenType.USER_DEFINED)
    assert made.types[n + 1] == gguf.TokenType.UNUSED
    assert made.tokens[n + 2] == "<z>"
    depends = [AddedToken("<vis>", n, special=False, lstrip=True)]
    with pytest.raises(UserError, match="'<vis>', which depends on what is beside it"):
        vocabulary_of(HuggingFaceTokenizer(file, added=depends), n + 3)


def test_the_pad_token_of_a_folder_is_that_of_the_file(llama3):
    carrying = TiktokenTokenizer(llama3.model)
    carrying.carried = {"pad_token": "<|reserved_special_token_5|>"}
    pad = llama3.special_tokens["<|reserved_special_token_5|>"]
    assert vocabulary_of(carrying, 700).ids["pad"] == pad


# --------------------------------------------------------------------------------- what is refused


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tokenizer, llama3):
    def refused(json, match):
        with pytest.raises(UserError, match=match):
            vocabulary_of(HuggingFaceTokenizer(json), 700)

    pieces = [spell(piece) for piece in llama3.ranks]
    cut = llama3_json(pieces, [], llama3.special_tokens.items())
    cut["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{L}+|\s+"}
    refused(cut, "pattern other than Llama 3's")
    words = sentencepiece_json(tokenizer)
    words["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "split": True}
    refused(words, "cut before BPE")
    # SentencePiece models with another normaliser, and without bytes: fields put after the model.
    with pytest.raises(UserError, match=r"unigram.*--tokenizer none"):
        vocabulary_of(SentencePieceTokenizer(tokenizer.model + b"\x12\x02\x18\x03"), ROWS)


def test_a_normalisation_that_llama_cpp_leaves_out_is_written_and_said(tokenizer, tmp_path, capsys):
    squeezing = SentencePieceTokenizer(tokenizer.model + b"\x1a\x02\x20\x01")  # extra spaces
    model = config()
    found = fields(write(tmp_path / "model.gguf", model, tiny.params(model), squeezing))
    assert found["tokenizer.ggml.remove_extra_whitespaces"] is True
    assert "removes spaces at the ends of a text, and llama.cpp does not" in capsys.readouterr().err


def test_tokens_without_a_row_are_left_out(tokenizer, capsys):
    added = [AddedToken("<pad>", VOCAB)]
    more = SentencePieceTokenizer(tokenizer.model, added=added)
    vocabulary = vocabulary_of(more, VOCAB)
    assert vocabulary.tokens == vocabulary_of(tokenizer, VOCAB).tokens
    assert "1 tokens that have no row in the model are left out: <pad>" in capsys.readouterr().err


def test_a_file_without_a_tokenizer_takes_ids(tmp_path):
    model = config()
    found = fields(write(tmp_path / "model.gguf", model, tiny.params(model), None))
    assert found["tokenizer.ggml.model"] == "no_vocab"
    assert "tokenizer.ggml.tokens" not in found


def test_bos_and_eos_are_added_as_the_tokenizer_says(tokenizer):
    writer = gguf.GGUFWriter(None, "llama")
    other = SentencePieceTokenizer(tokenizer.model, adds_bos=False, adds_eos=True)
    vocabulary_of(other, ROWS).add_to(writer)
    added = [writer.kv_data[0][f"tokenizer.ggml.add_{key}_token"].value for key in ("bos", "eos")]
    assert added == [False, True]


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("Q4_K_M", r"llama-quantize MODEL-F16.gguf MODEL-Q4_K_M.gguf Q4_K_M"),
        ("iq3_xs", r"llama-quantize .* IQ3_XS"),
        ("float8", r"FLOAT8: .*no such kind .* one of F32, F16"),
    ],
)
def test_other_kinds_are_refused(kind, match, tokenizer, tmp_path):
    with pytest.raises(UserError, match=match):
        write_gguf(tmp_path / "model.gguf", config(), tiny.params(config()), tokenizer, kind)
    assert not any(tmp_path.iterdir())


def test_a_model_that_gguf_cannot_express_is_refused(tokenizer, tmp_path):
    cases = [
        (config(qk_norm=True), tokenizer, "layers.attention.k_norm.scale: has no name"),
        (config(vocab_size=VOCAB - 1), tokenizer, f"has {VOCAB} tokens, and the model {VOCAB - 1}"),
    ]
    for model, tok, match in cases:
        with pytest.raises(UserError, match=match):
            write_gguf(tmp_path / "model.gguf", model, tiny.params(model), tok, "F32")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "kind", "match"),
    [
        (65536, "F16", r"blk.1.ffn_up.weight: 65536 does not fit F16; use BF16 or F32"),
        (-65536, "Q8_0", r"blk.1.ffn_up.weight: 65536 does not fit Q8_0"),
        (65536, "BF16", None),
        (65536, "F32", None),
        (np.float32(3.4e38), "BF16", r"3.4e\+38 does not fit BF16; use F32"),
        (np.float32(3.4e38), "Q8_0", r"3.4e\+38 does not fit Q8_0; use F32"),
        (np.float32(3.4e38), "F32", None),
        (np.nan, "F32", r"blk.1.ffn_up.weight: .*NaN"),
        (-np.inf, "Q4_0", r"blk.1.ffn_up.weight: .*infinit"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(value, kind, match, tokenizer, tmp_path):
    model = config(hidden_dim=64, ffn_dim=96)
    params = tiny.params(model)
    up = params["layers"]["mlp"]["up"]
    up["kernel"] = up["kernel"].at[1, 3, 5].set(value)
    if match is None:
        found = tensors(write(tmp_path / "model.gguf", model, params, tokenizer, kind))
        assert found["blk.1.ffn_up.weight"][5, 3] == value
        return
    with pytest.raises(UserError, match=match):
        write_gguf(tmp_path / "model.gguf", model, params, tokenizer, kind)
    assert not any(tmp_path.iterdir())


def test_an_existing_file_stays(tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        write_gguf(path, config(), tiny.params(config()), tokenizer, "F32")
    assert path.read_text() == "mine"


def test_a_full_disk_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    real = gguf.GGUFWriter.write_tensor_data
    left = [5]

    def full(self, tensor):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(StorageError, match=r"model.gguf: not writable: No space left"):
        write_gguf(tmp_path / "model.gguf", config(), tiny.params(config()), tokenizer, "F32")
    assert not any(tmp_path.iterdir())


def test_the_layout_written_out_here_is_not_the_identity():
    file = np.arange(64 * 48, dtype=np.float32).reshape(64, 48)
    turned, plain = (ours(file, tiny.config(), f"attention.{m}.kernel") for m in "qv")
    assert not np.array_equal(turned, plain)
    assert struct.pack("<f", turned[0, 0, 8]) == struct.pack("<f", file[1, 0])
