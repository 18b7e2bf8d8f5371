"""Loading: files by their content, folders with their settings, errors in one line."""

import json

import pytest
from tokenizer_files import added, metaspace, template

from jllama.errors import UserError
from jllama.text.huggingface import HuggingFaceTokenizer
from jllama.text.llama3 import TiktokenTokenizer
from jllama.text.spm import SentencePieceTokenizer
from jllama.text.tokenizer import load_tokenizer


@pytest.fixture
def folder(tmp_path):
    """Writes files to a folder: bytes as they are, anything else as JSON."""

    def write(**files):
        for name, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            (tmp_path / name.replace("__", ".")).write_bytes(data)
        return tmp_path

    return write


def test_a_file_is_known_by_its_content(folder, spm_model, llama3_model, byte_json):
    path = folder(a__model=spm_model, b__model=llama3_model, c__model=byte_json)
    kinds = [type(load_tokenizer(path / f"{name}.model")) for name in "abc"]
    assert kinds == [SentencePieceTokenizer, TiktokenTokenizer, HuggingFaceTokenizer]


def test_a_folder_gives_the_model_or_else_the_json(folder, spm_model, spm_json, tmp_path):
    assert isinstance(load_tokenizer(folder(tokenizer__json=spm_json)), HuggingFaceTokenizer)
    agreeing = load_tokenizer(folder(tokenizer__model=spm_model))
    assert isinstance(agreeing, SentencePieceTokenizer)
    assert agreeing.digest == load_tokenizer(tmp_path / "tokenizer.model").digest


@pytest.mark.parametrize(
    "tokens", [[added("<new>", 40_000)], [added("<new>", 3)]], ids=["one more", "another id"]
)
def test_a_json_that_disagrees_with_the_model_wins(folder, spm_model, spm_json, tokens):
    vocab = {
        ("<new>" if i == tokens[0]["id"] else t): i for t, i in spm_json["model"]["vocab"].items()
    }
    file = metaspace(spm_json, "first") | {"added_tokens": spm_json["added_tokens"] + tokens}
    if tokens[0]["id"] == 40_000:
        file["model"] = spm_json["model"]
        tokenizer = load_tokenizer(folder(tokenizer__model=spm_model, tokenizer__json=file))
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        assert tokenizer.special_tokens["<new>"] == 40_000
    else:  # it is refused, because a byte has no token
        file["model"] = spm_json["model"] | {"vocab": vocab}
        with pytest.raises(UserError, match=r"tokenizer\.json: .*1 of 256 bytes have no token"):
            load_tokenizer(folder(tokenizer__model=spm_model, tokenizer__json=file))


def test_a_json_with_the_models_own_added_tokens_agrees(folder, spm_model, spm_json, made):
    n = made["spm"].vocab_size
    file = spm_json | {"added_tokens": [*spm_json["added_tokens"], added("[PAD]", n)]}
    files = {"tokenizer__model": spm_model, "tokenizer__json": file}
    tokenizer = load_tokenizer(folder(**files, added_tokens__json={"[PAD]": n}))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.added_tokens == {"[PAD]": n}


def test_llama3s_own_json_agrees_and_one_with_other_names_wins(folder, llama3_model, byte_json):
    files = {"tokenizer__model": llama3_model, "tokenizer__json": byte_json}
    assert isinstance(load_tokenizer(folder(**files)), TiktokenTokenizer)
    named = json.loads(json.dumps(byte_json).replace("<|step_id|>", "<|mine|>"))
    tokenizer = load_tokenizer(folder(tokenizer__model=llama3_model, tokenizer__json=named))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert "<|mine|>" in tokenizer.special_tokens


def test_added_tokens_of_a_folder(folder, spm_model, made):
    """Chinese-Alpaca has one file with ids, and another that declares special tokens."""
    n = made["spm"].vocab_size
    path = folder(
        tokenizer__model=spm_model,
        added_tokens__json={"[PAD]": n, "<tool>": n + 1},
        special_tokens_map__json={"pad_token": {"content": "[PAD]"}, "bos_token": "<s>"},
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.added_tokens == {"[PAD]": n, "<tool>": n + 1}
    assert tokenizer.special_tokens == made["spm"].special_tokens | {"[PAD]": n}
    assert tokenizer.encode("[PAD]") == made["spm"].encode("[PAD]")
    assert tokenizer.encode("<tool>") == [n + 1]
    again = path / "again"
    tokenizer.save(again)
    assert load_tokenizer(again).digest == tokenizer.digest != made["spm"].digest
    assert load_tokenizer(again).encode("a<tool>b") == tokenizer.encode("a<tool>b")


def test_settings_of_a_plain_llama_folder_change_nothing(folder, spm_model, made):
    ends = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    decoder = {str(i): added(t, i) for i, t in enumerate(("<unk>", "<s>", "</s>"))}
    path = folder(
        tokenizer__model=spm_model,
        tokenizer_config__json=ends | {"added_tokens_decoder": decoder, "pad_token": None},
        special_tokens_map__json=ends | {"unk_token": "<unk>"},
        generation_config__json={"bos_token_id": 1, "eos_token_id": 2},
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.digest == made["spm"].digest
    assert tokenizer.files() == {"tokenizer.model": spm_model}


@pytest.mark.parametrize("kind", ["spm", "llama3", "json"])
def test_the_folder_says_what_begins_and_ends(folder, spm_model, llama3_model, byte_json, kind):
    model = {
        "spm": {"tokenizer__model": spm_model},
        "llama3": {"tokenizer__model": llama3_model},
        "json": {"tokenizer__json": byte_json},
    }[kind]
    eos = "<s>" if kind == "spm" else "<|eot_id|>"
    path = folder(
        **model,
        tokenizer_config__json={"eos_token": {"content": eos}},
        generation_config__json={"eos_token_id": [5, 6]},
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_id == tokenizer.special_tokens[eos]
    assert {5, 6, tokenizer.eos_id} <= tokenizer.stop_ids
    tokenizer.save(path / "again")
    again = load_tokenizer(path / "again")
    assert (again.eos_id, again.stop_ids) == (tokenizer.eos_id, tokenizer.stop_ids)
    assert again.digest == tokenizer.digest


@pytest.mark.parametrize("kind", ["spm", "llama3"])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_the_folder_says_whether_a_text_gets_bos_and_eos(
    folder, spm_model, llama3_model, kind, bos, eos
):
    model = {"spm": spm_model, "llama3": llama3_model}[kind]
    plain = load_tokenizer(folder(tokenizer__model=model))
    assert (plain.adds_bos, plain.adds_eos) == (True, False)
    settings = {"add_bos_token": bos, "add_eos_token": eos}
    path = folder(tokenizer__model=model, tokenizer_config__json=settings)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.adds_bos, tokenizer.adds_eos) == (bos, eos)
    # Prepared texts differ, so they have names of their own.
    assert (tokenizer.digest == plain.digest) == ((bos, eos) == (True, False))
    tokenizer.save(path / "again")
    again = load_tokenizer(path / "again")
    assert (again.adds_bos, again.adds_eos, again.digest) == (bos, eos, tokenizer.digest)


@pytest.mark.parametrize("model", [False, True], ids=["alone", "beside the model"])
@pytest.mark.parametrize(
    ("processor", "adds"),
    [
        (None, (False, False)),
        ({"type": "ByteLevel", "add_prefix_space": True}, (False, False)),
        (template({"<s>": 1}), (True, False)),
        (template({}, {"</s>": 2}), (False, True)),
        ({"type": "RobertaProcessing", "cls": ["<s>", 1], "sep": ["</s>", 2]}, (True, True)),
        (
            {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template({"<s>": 1})]},
            (True, False),
        ),
    ],
)
def test_a_post_processor_decides_what_a_text_gets(
    folder, spm_model, spm_json, processor, adds, model
):
    path = folder(
        tokenizer__json=spm_json | {"post_processor": processor},
        **{"tokenizer__model": spm_model} if model else {},
    )
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, SentencePieceTokenizer if model else HuggingFaceTokenizer)
    assert (tokenizer.adds_bos, tokenizer.adds_eos) == adds
    tokenizer.save(path / "again")
    again = load_tokenizer(path / "again")
    assert (again.adds_bos, again.adds_eos, again.digest) == (*adds, tokenizer.digest)


def test_a_key_that_the_post_processor_contradicts_is_said(folder, spm_json, capsys):
    path = folder(tokenizer__json=spm_json, tokenizer_config__json={"add_bos_token": False})
    assert load_tokenizer(path).adds_bos
    assert "adds BOS and counts, as in transformers 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "processor", [template({"<unk>": 0}), template({"<s>": 1, "<unk>": 0}), {"type": "Mine"}, 3]
)
def test_a_post_processor_that_adds_other_tokens_is_refused(folder, spm_json, processor):
    path = folder(tokenizer__json=spm_json | {"post_processor": processor})
    with pytest.raises(UserError, match=r"tokenizer\.json: .*post.processor") as e:
        load_tokenizer(path)
    assert "\n" not in str(e.value)


def test_ends_that_stand_in_config_json_alone_end_a_text(folder, spm_model, made):
    eos = made["spm"].eos_id
    path = folder(tokenizer__model=spm_model, config__json={"eos_token_id": [7, 8]})
    assert load_tokenizer(path).stop_ids == {eos, 7, 8}
    folder(config__json={"eos_token_id": 9}, generation_config__json={"temperature": 1})
    assert load_tokenizer(path).stop_ids == {eos, 9}
    folder(generation_config__json={"eos_token_id": 7})
    assert load_tokenizer(path).stop_ids == {eos, 7}


def test_keys_that_are_not_followed_are_said(folder, spm_model, capsys):
    followed = {"legacy": False, "add_prefix_space": True, "sp_model_kwargs": {}}
    load_tokenizer(folder(tokenizer__model=spm_model, tokenizer_config__json=followed))
    assert not capsys.readouterr().err
    other = {"add_prefix_space": False, "sp_model_kwargs": {"alpha": 0.1}, "brand_new": 1}
    load_tokenizer(folder(tokenizer__model=spm_model, tokenizer_config__json=other))
    said = capsys.readouterr().err
    assert "keys that are not followed: add_prefix_space, brand_new, sp_model_kwargs" in said


def test_what_ends_a_text_is_no_part_of_the_digest(folder, spm_model, made):
    path = folder(tokenizer__model=spm_model, generation_config__json={"eos_token_id": 7})
    assert load_tokenizer(path).stop_ids == {made["spm"].eos_id, 7}
    assert load_tokenizer(path).digest == made["spm"].digest


@pytest.mark.parametrize("kind", ["spm", "llama3", "json"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_is_kept_for_others(folder, spm_model, llama3_model, byte_json, kind, file):
    model = {
        "spm": {"tokenizer__model": spm_model},
        "llama3": {"tokenizer__model": llama3_model},
        "json": {"tokenizer__json": byte_json},
    }[kind]
    plain = load_tokenizer(folder(**model))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    ends = {"pad_token": "</s>" if kind == "spm" else "<|end_of_text|>", "padding_side": "left"}
    if file == "chat_template.jinja":
        path = folder(chat_template__jinja=template.encode(), tokenizer_config__json=ends)
    else:
        path = folder(tokenizer_config__json=ends | {"chat_template": template})
    tokenizer = load_tokenizer(path)
    assert tokenizer.carried == ends | {"chat_template": template}
    assert (tokenizer.digest, plain.carried) == (plain.digest, {})
    tokenizer.save(path / "again")
    assert load_tokenizer(path / "again").carried == tokenizer.carried


def test_a_pad_token_that_is_none_of_the_vocabulary_is_left_out(folder, spm_model):
    path = folder(tokenizer__model=spm_model, tokenizer_config__json={"pad_token": "<pad>"})
    assert load_tokenizer(path).carried == {}


@pytest.mark.parametrize("special", [False, True])
def test_tokens_that_a_json_lacks_come_from_the_settings(folder, byte_json, special):
    n = 300_000
    path = folder(
        tokenizer__json=byte_json,
        tokenizer_config__json={"added_tokens_decoder": {n: added("<x>", n, special=special)}},
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("<x>", special=True) == [n]
    assert (tokenizer.encode("<x>") == [n]) is not special
    tokenizer.save(path / "again")
    assert load_tokenizer(path / "again").encode("<x>", special=True) == [n]


def test_metas_folder_may_have_its_tokenizer_above(tmp_path, llama3_model):
    weights = tmp_path / "8B"
    weights.mkdir()
    (tmp_path / "tokenizer.model").write_bytes(llama3_model)
    with pytest.raises(UserError, match="8B: no such tokenizer: neither"):
        load_tokenizer(weights)
    (weights / "params.json").write_text("{}")
    assert isinstance(load_tokenizer(weights), TiktokenTokenizer)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "no such tokenizer: neither tokenizer.model nor tokenizer.json is in the folder"),
        ({"tokenizer__model": b""}, "tokenizer.model: not a SentencePiece model"),
        ({"tokenizer__model": b"version https://git-lfs"}, "not a SentencePiece model, Llama"),
        ({"tokenizer__model": b"IQ== 0\nIg= 1\n"}, "tokenizer.model:2: not a piece in base64"),
        ({"tokenizer__json": b"{"}, "tokenizer.json: not JSON"),
        ({"tokenizer__json": b"\xff\xfe"}, "tokenizer.json: not JSON"),
        ({"tokenizer__json": b"[" * 100_000}, "tokenizer.json: not JSON"),
        ({"tokenizer__json": []}, "tokenizer.json: not a tokenizer.json"),
        ({"tokenizer__json": {"a": 1}}, "tokenizer.json: not a tokenizer.json"),
        ({"tokenizer_config__json": b"{"}, "tokenizer_config.json: not readable as JSON"),
        ({"tokenizer_config__json": []}, "tokenizer_config.json: expected a JSON object"),
        ({"tokenizer_config__json": {"bos_token": 1}}, "tokenizer_config.json: not as Hugging"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"x": {}}}}, "config.json: not as H"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"5": {}}}}, "config.json: not as H"),
        ({"tokenizer_config__json": {"eos_token": "<e>"}}, "eos_token '<e>' is not in the voc"),
        ({"special_tokens_map__json": {"pad_token": 1}}, "map.json: not as Hugging"),
        ({"added_tokens__json": {"a": "b"}}, "added_tokens.json: not as Hugging"),
        ({"added_tokens__json": {"[PAD]": 5}}, "'.PAD.' has the id 5, which belongs to '<0x02>'"),
        ({"generation_config__json": {"eos_token_id": "2"}}, "generation_config.json: not as H"),
        ({"generation_config__json": {"eos_token_id": 1 << 20}}, "eos_token_id 1048576 of gen"),
    ],
    ids=lambda x: "" if isinstance(x, dict) else x[:24],
)  # fmt: skip
def test_bad_files_are_one_line(folder, spm_model, files, expected):
    if files and not any(name.startswith("tokenizer__") for name in files):
        files = files | {"tokenizer__model": spm_model}
    with pytest.raises(UserError, match=expected) as e:
        load_tokenizer(folder(**files))
    assert "\n" not in str(e.value)


def test_tokens_of_another_name_or_id_are_mended_as_the_message_says(
    folder, spm_model, llama3_model, byte_json, made
):
    path = folder(tokenizer__model=spm_model, added_tokens__json={"[PAD]": 5})
    with pytest.raises(UserError, match="give it a free id"):
        load_tokenizer(path)
    n = made["spm"].vocab_size
    tokenizer = load_tokenizer(folder(added_tokens__json={"[PAD]": n}))
    assert tokenizer.added_tokens == {"[PAD]": n}
    n = made["llama3"].vocab_size
    path = folder(tokenizer__model=llama3_model, added_tokens__json={"<mine>": n})
    with pytest.raises(UserError, match=r"put the tokenizer\.json that has it beside this file"):
        load_tokenizer(path)
    mine = byte_json | {"added_tokens": [*byte_json["added_tokens"], added("<mine>", n)]}
    assert load_tokenizer(folder(tokenizer__json=mine)).encode("<mine>", special=True) == [n]


def test_a_json_without_the_usual_ends_has_them_named_beside_it(folder, byte_json):
    file = byte_json | {"added_tokens": byte_json["added_tokens"][2:], "post_processor": None}
    path = folder(tokenizer__json=file)
    with pytest.raises(UserError, match=r"bos_token: .* name it in a tokenizer_config\.json"):
        load_tokenizer(path)
    names = {"bos_token": "<|reserved_special_token_0|>"}
    with pytest.raises(UserError, match=r"eos_token: .* name it in a tokenizer_config\.json"):
        load_tokenizer(folder(tokenizer_config__json=names))
    names["eos_token"] = "<|eot_id|>"
    tokenizer = load_tokenizer(folder(tokenizer_config__json=names))
    ends = [tokenizer.special_tokens[name] for name in names.values()]
    assert [tokenizer.bos_id, tokenizer.eos_id] == ends


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.model: no such file"):
        load_tokenizer(tmp_path / "none.model")


def test_a_step_of_a_run_has_the_runs_tokenizer(tmp_path, spm_model, llama3_model, monkeypatch):
    step = tmp_path / "run" / "checkpoints" / "20"
    step.mkdir(parents=True)
    (step / "_CHECKPOINT_METADATA").write_text("{}")
    (tmp_path / "run" / "tokenizer.model").write_bytes(spm_model)
    with pytest.raises(UserError, match="no such tokenizer"):  # a folder of somebody else's
        load_tokenizer(step)
    (tmp_path / "run" / "config.yaml").write_text("")
    for where, name in ((tmp_path, step), (step.parent, "20"), (step, ".")):
        monkeypatch.chdir(where)
        assert isinstance(load_tokenizer(name), SentencePieceTokenizer)
    # Meta's has it one folder above, whatever that is called.
    (tmp_path / "run" / "config.yaml").unlink()
    (step / "params.json").write_text("{}")
    (step.parent / "tokenizer.model").write_bytes(llama3_model)
    assert isinstance(load_tokenizer(step), TiktokenTokenizer)
