"""`jllama convert` between all formats, and what it refuses."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import tiny
import tokenizers
import yaml
from safetensors.numpy import load_file

import jllama
from jllama.adapt.lora import overlay_specs
from jllama.cli import main
from jllama.config import LoraConfig, NtkRopeScaling, TrainedTokenizer
from jllama.config import recipe as recipes
from jllama.interop import hf
from jllama.interop.parameters import cast_params
from jllama.interop.peft_write import write_adapter
from jllama.store.write import write_model
from jllama.text.added import AddedToken
from jllama.text.spm import SentencePieceTokenizer
from jllama.text.tokenizer import load_tokenizer
from jllama.text.vocabulary import train_sentencepiece

MODEL = tiny.config(num_kv_heads=2, vocab_size=448)


@pytest.fixture(scope="module")
def params():
    return tiny.params(MODEL)


@pytest.fixture(scope="module")
def tokenizer():
    text = Path(__file__).read_text()
    return train_sentencepiece([text], TrainedTokenizer(kind="train", vocab_size=400))


@pytest.fixture(scope="module")
def own(tmp_path_factory, params, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "own"
    write_model(folder, MODEL, params, tokenizer)
    return folder


def convert(*words):
    return main(["convert", *map(str, words)])


def same(folder, params, **options):
    model = jllama.load(folder, **options)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    return model


def test_there_and_back_keeps_every_bit_and_the_tokenizer(own, params, tokenizer, tmp_path, capsys):
    assert convert(own, tmp_path / "hf") == 0
    assert convert(tmp_path / "hf", tmp_path / "back") == 0
    for folder in ("hf", "back"):
        model = same(tmp_path / folder, params)
        assert model.tokenizer.digest == tokenizer.digest
        assert model.config == jllama.load(own).config or folder == "hf"
    text = "def test(x):\n    return x"
    assert jllama.load(tmp_path / "hf").tokenizer.encode(text) == tokenizer.encode(text)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{tmp_path / 'hf'}: hf, float32, {out[0].split(', ')[-1]}"


def test_half_precision_is_stored_as_asked_and_kept(own, tmp_path):
    assert convert(own, tmp_path / "half", "--to", "hf", "--dtype", "float16") == 0
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float16"
    assert convert(tmp_path / "half", tmp_path / "again", "--to", "hf") == 0
    bits = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("half", "again")]
    assert bits[0] == bits[1]
    # float32 holds it exactly.
    assert convert(tmp_path / "half", tmp_path / "wide") == 0
    same(tmp_path / "wide", jllama.load(tmp_path / "half").params)


def test_norms_keep_a_wider_dtype_of_their_own(params, tokenizer, tmp_path):
    mixed = cast_params(params, "bfloat16", "float32")
    hf.write_folder(tmp_path / "mixed", MODEL, mixed, tokenizer)
    assert convert(tmp_path / "mixed", tmp_path / "own") == 0
    assert convert(tmp_path / "own", tmp_path / "back") == 0
    bits = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("mixed", "back")]
    assert bits[0] == bits[1]
    model = same(tmp_path / "own", mixed)
    assert model.params["final_norm"]["scale"].dtype == "float32"
    assert model.params["head"]["weight"].dtype == "bfloat16"
    # As asked, all of it.
    assert convert(tmp_path / "own", tmp_path / "all", "--to", "hf", "--dtype", "bfloat16") == 0
    found = load_file(tmp_path / "all" / "model.safetensors")
    assert {t.dtype.name for t in found.values()} == {"bfloat16"}


@pytest.mark.parametrize(("to", "dtype"), [("hf", "float16"), ("jllama", "bfloat16")])
def test_a_value_that_does_not_fit_is_an_error_by_name(params, tmp_path, to, dtype, capsys):
    loud = {**params, "head": {"weight": params["head"]["weight"].at[3, 3].set(3.4e38)}}
    write_model(tmp_path / "loud", MODEL, loud, None)
    capsys.readouterr()
    assert convert(tmp_path / "loud", tmp_path / "out", "--to", to, "--dtype", dtype) == 2
    said = f"error: head.weight: 3.4e+38 does not fit {dtype}; use float32"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert [path.name for path in tmp_path.iterdir()] == ["loud"]
    assert convert(tmp_path / "loud", tmp_path / "out", "--to", to, "--dtype", "float32") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to", ["jllama", "hf"])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, number, to):
    large = tiny.config(vocab_size=32000, hidden_dim=1024, num_layers=4)
    hf.write_folder(tmp_path / "source", large, tiny.params(large), None)
    command = [sys.executable, "-m", "jllama", "convert", "source", "out", "--to", to]
    for _ in range(5):  # on a busy machine the signal may come when all is written
        process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=tmp_path, text=True)
        while not any(path.name.startswith("out") for path in tmp_path.iterdir()):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        if not (tmp_path / "out").exists():
            break
        shutil.rmtree(tmp_path / "out")
    assert process.returncode == 128 + number
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("format", ["hf", "jllama"])
@pytest.mark.parametrize("there", [True, False], ids=["empty", "dangling"])
def test_a_link_to_where_the_model_shall_be_is_followed(own, params, tmp_path, format, there):
    if there:
        (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert convert(own, tmp_path / "out", "--to", format) == 0
    assert (tmp_path / "out").is_symlink()
    same(tmp_path / "disk", params)


def test_a_link_to_where_the_file_shall_be_is_followed(own, tmp_path):
    (tmp_path / "out.gguf").symlink_to(tmp_path / "disk.gguf")
    assert convert(own, tmp_path / "out.gguf") == 0
    assert (tmp_path / "out.gguf").is_symlink()
    assert gguf.GGUFReader(tmp_path / "disk.gguf").tensors


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_a_disk_without_room_is_said_before_anything_is_written(
    own, tmp_path, name, monkeypatch, capsys
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10_000))
    assert convert(own, tmp_path / name) == 74
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"error: .*{name}: takes 0\.\d\d GB, and .* has 0\.00 GB left", error)
    assert list(tmp_path.iterdir()) == []


def test_a_chat_template_goes_along(own, tmp_path):
    template = "{{ messages[0].content }}"
    shutil.copytree(own, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    assert convert(tmp_path / "chat", tmp_path / "hf") == 0
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == template
    assert convert(tmp_path / "hf", tmp_path / "back") == 0
    assert convert(tmp_path / "back", tmp_path / "model.gguf") == 0
    field = gguf.GGUFReader(tmp_path / "model.gguf").get_field("tokenizer.chat_template")
    assert field.contents() == template


def test_a_name_that_ends_in_gguf_is_one(own, tmp_path):
    assert convert(own, tmp_path / "model.gguf") == 0
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{own}", "{out}", "--dtype", "int8"], "--dtype int8: hf has float32, bfloat16, float16"),
        (
            ["{own}", "{out}", "--to", "jllama", "--dtype", "float16"],
            "jllama has float32, bfloat16",
        ),
        (["{own}", "{out}.gguf", "--dtype", "Q4_K_M"], "llama-quantize"),
        (["{own}", "{own}"], "exists"),
        (["{own}", "{out}", "--model", "llama-7b"], "--model llama-7b"),
        (["{own}", "{out}", "--from", "hf"], "config.json: no such file"),
        (["{out}", "{out}2"], "no such folder"),
        (["{own}/config.yaml", "{out}"], "config.yaml: a file, give its folder"),
        (["{own}", "{own}/config.yaml/x"], "config.yaml is a file"),
        (["{own}", "{own}/config.yaml/x", "--to", "jllama"], "config.yaml is a file"),
        (["{own}", "{out}", "--dtype", "Q8_0"], "Q8_0 is a kind of FILE.gguf"),
        (["{own}", "{out}", "--tokenizer", "{own}/x"], "x: no such file"),
        (["{own}", "{out}.gguf", "--tokenizer", "copy"], "--tokenizer copy: is for folders"),
        (["{own}", "{out}", "--max-length", "0"], "max_length=0"),
        (["{own}"], "DST"),
        (["", "{out}"], "SRC is empty"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(own, tmp_path, words, said, capsys):
    words = [word.format(own=own, out=tmp_path / "out") for word in words]
    assert convert(*words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_info_of_a_folder_needs_no_weights(own, params, tmp_path, capsys):
    hf.write_folder(tmp_path / "hf", MODEL, params, None)
    (tmp_path / "hf" / "model.safetensors").unlink()
    figures = []
    for folder in (own, tmp_path / "hf"):
        capsys.readouterr()
        assert main(["info", str(folder), "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out) | {"model": "one"})
    assert figures[0] == figures[1]


def test_tokens_beyond_the_rows_stay_in_the_tokenizer(tmp_path, tokenizer, capsys):
    """Code Llama 34B has 32,004 ids and 32,000 rows."""
    small = tiny.config(vocab_size=400)
    hf.write_folder(tmp_path / "hf", small, tiny.params(small), None)
    more = SentencePieceTokenizer(tokenizer.model, added=[AddedToken("<pad>", 400)])
    more.save(tmp_path / "hf")
    assert convert(tmp_path / "hf", tmp_path / "own") == 0
    assert convert(tmp_path / "own", tmp_path / "back") == 0
    assert "rows" not in capsys.readouterr().err
    for name in ("hf", "own", "back"):
        model = jllama.load(tmp_path / name)
        assert model.tokenizer.vocab_size == 401
        model.generate("def", max_new_tokens=4)
        with pytest.raises(jllama.UserError, match="id 400 is not in the vocabulary of 400"):
            model.generate([[1, 400]], max_new_tokens=4)


def test_a_tokenizer_of_another_model_is_said(tmp_path, tokenizer, capsys):
    small = tiny.config(vocab_size=399)
    hf.write_folder(tmp_path / "hf", small, tiny.params(small), None)
    tokenizer.save(tmp_path / "hf")
    assert convert(tmp_path / "hf", tmp_path / "out") == 0
    assert "400 ids and its embedding 399 rows: a text that needs" in capsys.readouterr().err
    # llama.cpp would look for the row, and GGUF has no way to say that there is none.
    assert convert(tmp_path / "hf", tmp_path / "x.gguf") == 2
    said = "400 tokens, and the model 399 rows: convert with --tokenizer none for a file that takes"
    assert said in capsys.readouterr().err
    assert convert(tmp_path / "hf", tmp_path / "ids.gguf", "--tokenizer", "none") == 0
    text = Path(__file__).read_text()
    fitting = train_sentencepiece([text], TrainedTokenizer(kind="train", vocab_size=399))
    fitting.save(tmp_path / "fitting")
    assert convert(tmp_path / "hf", tmp_path / "x.gguf", "--tokenizer", tmp_path / "fitting") == 0


def test_the_tokenizer_is_left_out_copied_or_anothers(tmp_path, own, tokenizer, capsys):
    assert convert(own, tmp_path / "none", "--tokenizer", "none") == 0
    bare = jllama.load(tmp_path / "none")
    for use in (bare.generate, lambda text: bare.score(text, ["b"])):
        with pytest.raises(jllama.UserError, match=r"load it with one \(tokenizer=PATH"):
            use("a")
    with_one = jllama.load(tmp_path / "none", tokenizer=own)
    assert with_one.score("a", ["b"]) == jllama.load(own).score("a", ["b"])
    assert convert(tmp_path / "none", tmp_path / "x.gguf") == 2
    assert "give one (--tokenizer PATH), or --tokenizer none for a" in capsys.readouterr().err
    assert convert(tmp_path / "none", tmp_path / "x.gguf", "--tokenizer", own) == 0
    assert convert(tmp_path / "none", tmp_path / "none.gguf", "--tokenizer", "none") == 0
    assert convert(own, tmp_path / "own.gguf", "--tokenizer", "copy") == 2
    assert "is for folders; take none or a PATH" in capsys.readouterr().err
    assert convert(own, tmp_path / "own.gguf", "--tokenizer", "none") == 0
    assert convert(tmp_path / "none", tmp_path / "other", "--tokenizer", own) == 0
    assert jllama.load(tmp_path / "other").tokenizer.digest == tokenizer.digest
    # One that cannot be read costs no weights, and goes along as it is.
    source = tmp_path / "strange"
    shutil.copytree(tmp_path / "none", source)
    (source / "tokenizer.json").write_text('{"model": {"type": "WordPiece", "vocab": {"a": 0}}}')
    (source / "tokenizer_config.json").write_text('{"bos_token": "a"}')
    capsys.readouterr()
    assert convert(source, tmp_path / "copy", "--tokenizer", "copy", "--to", "hf") == 0
    error = capsys.readouterr().err
    assert "read without its tokenizer" in error and "its model is WordPiece" in error
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()
    same(tmp_path / "copy", jllama.load(own).params)
    assert convert(source, tmp_path / "given.gguf", "--tokenizer", own) == 0
    assert jllama.load(source, tokenizer=own).score("a", ["b"]) == with_one.score("a", ["b"])


def test_small_models_tokenizers_leave_in_every_format(tmp_path, capsys):
    """stories260K's removes extra spaces, as SentencePiece does unless told not to."""
    small = tiny.config(vocab_size=512)
    tokenizer = SentencePieceTokenizer(tiny.llama2_c_tokenizer([Path(__file__).read_text()]))
    write_model(tmp_path / "own", small, tiny.params(small), tokenizer)
    for name in ("hf", "model.gguf", "there and back"):
        source = tmp_path / ("hf" if name == "there and back" else "own")
        assert convert(source, tmp_path / name) == 0
    for name in ("hf", "there and back"):
        assert jllama.load(tmp_path / name).tokenizer.digest == tokenizer.digest
    text = "  one   two "
    assert tokenizer.decode(tokenizer.encode(text)) == "one two"
    assert load_tokenizer(tmp_path / "hf").encode(text) == tokenizer.encode(text)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert theirs.encode(text).ids == tokenizer.encode(text, bos=True)
    assert "gguf: the tokenizer removes spaces at the ends" in capsys.readouterr().err


def test_a_tokenizer_that_gguf_lacks_is_left_out_or_replaced(
    tmp_path, own, params, tokenizer, capsys
):
    unigram = SentencePieceTokenizer(tokenizer.model + b"\x12\x02\x18\x03")  # another normaliser
    write_model(tmp_path / "model", MODEL, params, unigram)
    assert convert(tmp_path / "model", tmp_path / "x.gguf") == 2
    assert "--tokenizer none for a file that takes ids, or with --tok" in capsys.readouterr().err
    assert convert(tmp_path / "model", tmp_path / "ids.gguf", "--tokenizer", "none") == 0
    assert convert(tmp_path / "model", tmp_path / "x.gguf", "--tokenizer", own) == 0


def test_of_a_folder_in_two_formats_the_one_that_is_meant_is_converted(
    tmp_path, own, params, capsys
):
    hf.write_folder(tmp_path / "both", MODEL, params, None)
    (tmp_path / "both" / "config.yaml").write_text((own / "config.yaml").read_text())
    with pytest.raises(
        jllama.UserError, match=r"may be jllama or hf; .* \(jllama convert --from\)"
    ):
        jllama.load(tmp_path / "both")
    assert convert(tmp_path / "both", tmp_path / "out", "--from", "hf") == 0
    same(tmp_path / "out", params)


def test_a_rope_that_others_lack_is_changed_in_the_config_of_a_copy(tmp_path, capsys):
    adaptive = tiny.config(rope=tiny.ADAPTIVE1)
    write_model(tmp_path / "own", adaptive, tiny.params(adaptive), None)
    shutil.copytree(tmp_path / "own", tmp_path / "copy")
    file = tmp_path / "copy" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    for rope in (tiny.YARN, tiny.LINEAR, NtkRopeScaling(kind="ntk", alpha=4.0)):
        config["model"]["rope"] = recipes.to_dict(rope)
        file.write_text(yaml.safe_dump(config))
        out = tmp_path / f"{rope.kind}.gguf"
        assert convert(tmp_path / "copy", out, "--tokenizer", "none") == 0
    for name in ("hf", "x.gguf"):
        words = (tmp_path / name, "--tokenizer", "none")
        assert convert(tmp_path / "own", *words) == 2
        error = capsys.readouterr().err
        assert "ntk" in error and "in the config of a copy of the model" in error
        assert convert(tmp_path / "copy", *words) == 0
    assert jllama.load(tmp_path / "hf").config.rope_theta > adaptive.rope_theta


def test_a_length_after_linear_scaling_is_given(tmp_path, own, capsys):
    hf.write_folder(tmp_path / "hf", MODEL, jllama.load(own).params, None)
    file = tmp_path / "hf" / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    config["rope_scaling"] = {"type": "linear", "factor": 4.0}
    file.write_text(json.dumps(config))
    words = (tmp_path / "hf", tmp_path / "out")
    assert convert(*words) == 0
    said = capsys.readouterr().err
    length = re.search(r"convert the model with --max-length (\d+)", said)[1]
    assert jllama.load(tmp_path / "out").config.max_length == 4 * int(length)
    assert convert(tmp_path / "hf", tmp_path / "right", "--max-length", length) == 0
    assert jllama.load(tmp_path / "right").config.max_length == int(length) == MODEL.max_length
    assert jllama.load(tmp_path / "hf", max_length=int(length)).config.max_length == int(length)


def test_a_folder_of_meta_is_converted_with_the_file_that_says_the_rest(tmp_path, capsys):
    source = Path(__file__).parents[1] / "fixtures" / "meta-llama3"
    twin = jllama.load(source.with_name("hf-llama3"))
    assert convert(source, tmp_path / "out") == 2
    assert "write a file like those, with the rope and max_length" in capsys.readouterr().err
    (tmp_path / "model.yaml").write_text(recipes.to_yaml(twin.config))
    assert convert(source, tmp_path / "out", "--model", tmp_path / "model.yaml") == 0
    same(tmp_path / "out", twin.params)
    # Two tables that differ, under a model that ties them.
    tied = dataclasses.replace(twin.config, tie_embeddings=True)
    (tmp_path / "tied.yaml").write_text(recipes.to_yaml(tied))
    capsys.readouterr()
    assert convert(source, tmp_path / "two", "--model", tmp_path / "tied.yaml") == 2
    assert "a copy of it with tie_embeddings: false" in capsys.readouterr().err
    copy = (tmp_path / "tied.yaml").read_text().replace("dings: true", "dings: false")
    (tmp_path / "copy.yaml").write_text(copy)
    assert convert(source, tmp_path / "two", "--model", tmp_path / "copy.yaml") == 0
    same(tmp_path / "two", twin.params)


def test_a_tied_model_is_untied_for_an_adapter_of_two_tables(tmp_path):
    tied, adapt = (
        tiny.config(tie_embeddings=True),
        LoraConfig(kind="lora", rank=2, alpha=4.0, targets=("q",), full=("embedding", "head")),
    )
    params = tiny.params(tied)
    write_model(tmp_path / "BASE", tied, params, None)
    two = dataclasses.replace(tied, tie_embeddings=False)
    specs = overlay_specs(two, tiny.compute(), adapt)
    rng = np.random.default_rng(0)
    overlay = jax.tree.map(lambda spec: rng.normal(size=spec.shape).astype(np.float32), specs)
    write_adapter(tmp_path / "peft", two, adapt, overlay, "BASE")
    with pytest.raises(jllama.UserError, match="jllama convert BASE UNTIED --untie") as e:
        jllama.load(tmp_path / "BASE", adapter=tmp_path / "peft")
    command = str(e.value).rpartition("jllama convert ")[2].split()
    assert convert(*(tmp_path / word if word.isupper() else word for word in command)) == 0
    model = jllama.load(tmp_path / "UNTIED", adapter=tmp_path / "peft")
    for name in ("embedding", "head"):
        np.testing.assert_array_equal(model.params[name]["weight"], overlay[name]["weight"])


def test_a_length_of_ones_own_and_tables_of_their_own(tmp_path, capsys):
    tied = tiny.config(tie_embeddings=True)
    params = tiny.params(tied)
    write_model(tmp_path / "tied", tied, params, None)
    assert convert(tmp_path / "tied", tmp_path / "untied", "--untie", "--max-length", 99) == 0
    model = jllama.load(tmp_path / "untied")
    assert (model.config.tie_embeddings, model.config.max_length) == (False, 99)
    np.testing.assert_array_equal(model.params["head"]["weight"], params["embedding"]["weight"])
    tokens = tiny.tokens(1, 7)
    np.testing.assert_array_equal(
        model.logits(tokens), jllama.load(tmp_path / "tied").logits(tokens)
    )
    assert convert(tmp_path / "untied", tmp_path / "again", "--untie") == 2
    assert "has an embedding and a head already" in capsys.readouterr().err


def test_a_folder_without_its_last_file_is_no_model(own, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise jllama.UserError("disk full")

    monkeypatch.setattr("jllama.store.write.storage.write_text", full)
    hf_folder = tmp_path / "hf"
    assert convert(own, hf_folder, "--to", "jllama") == 2
    with pytest.raises(jllama.UserError, match="no such folder"):
        jllama.load(hf_folder)
    capsys.readouterr()
