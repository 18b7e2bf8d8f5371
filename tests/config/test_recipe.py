"""Recipes: an override changes its key and nothing else; a mistake is one line."""

import dataclasses
import json
import re
import shlex
import types
import typing
from typing import Annotated, Any, Literal

import annotated_types
import pytest

from jllama import config
from jllama.config import (
    AdamWConfig,
    AdaptiveRopeScaling,
    AutoAttention,
    BlockwiseAttention,
    CausalObjective,
    Config,
    ConstantSchedule,
    CosineSchedule,
    CudnnAttention,
    CutPacking,
    DynamicRopeScaling,
    FanInInit,
    HeldOutShare,
    InfillObjective,
    JsonlSource,
    LinearRopeScaling,
    Llama3RopeScaling,
    LoraConfig,
    ModelConfig,
    MuonConfig,
    NoAdapter,
    NoRopeScaling,
    NtkRopeScaling,
    ParquetSource,
    ReferenceAttention,
    ReplyObjective,
    SplashAttention,
    StdlibSource,
    TextSource,
    TfdsSource,
    TokenizerFile,
    TrainedTokenizer,
    TruncatedNormalInit,
    WholePacking,
    WsdSchedule,
    YarnRopeScaling,
    schema,
)
from jllama.config import recipe as recipes
from jllama.config.plain_yaml import parse_yaml
from jllama.errors import UserError

BASE = {
    "model": {
        "vocab_size": 512,
        "hidden_dim": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 16,
        "ffn_dim": 128,
        "max_length": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "rope": {"kind": "none"},
        "tie_embeddings": True,
    },
    "compute": {"dtype": "float32"},
    "tokenizer": {"kind": "train", "vocab_size": 400},
    "data": {
        "length": 64,
        "packing": {"kind": "whole"},
        "train": [{"name": "a", "source": {"kind": "stdlib", "split": "train"}}],
        "held_out": [{"name": "b", "source": {"kind": "stdlib", "split": "held_out"}}],
    },
    "training": {
        "steps": 100,
        "batch_size": 8,
        "init_from": "base",
        "optimizer": {
            "kind": "adamw",
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
        },
        "schedule": {"kind": "constant", "peak": 1e-3, "warmup_steps": 10},
    },
    "run": {"name": "test"},
}

# The required keys of every member of every sum type, with valid values.
MEMBERS = {
    NoRopeScaling: {},
    LinearRopeScaling: {"factor": 2.0},
    NtkRopeScaling: {"alpha": 2.0},
    DynamicRopeScaling: {"factor": 2.0, "original_length": 32},
    AdaptiveRopeScaling: {"original_length": 32, "coefficient": 2.5, "factor": 2.0},
    YarnRopeScaling: {"factor": 256.0, "original_length": 32},
    Llama3RopeScaling: {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_length": 64,
    },
    TruncatedNormalInit: {"std": 0.02, "scale_residual": True},
    FanInInit: {"embedding_std": 0.5, "scale_residual": False},
    AutoAttention: {},
    ReferenceAttention: {},
    BlockwiseAttention: {},
    CudnnAttention: {},
    SplashAttention: {},
    StdlibSource: {"split": "train"},
    TfdsSource: {"name": "c4/en:3.1.0", "split": "train"},
    TextSource: {"files": ["a.txt", "b/*.txt"]},
    JsonlSource: {"files": ["a.jsonl"]},
    ParquetSource: {"files": ["a.parquet"]},
    HeldOutShare: {"from": "train", "one_in": 25},
    CutPacking: {},
    WholePacking: {},
    CausalObjective: {},
    InfillObjective: {},
    ReplyObjective: {},
    NoAdapter: {},
    LoraConfig: {"rank": 4, "alpha": 8.0, "overrides": [{"match": "q", "layers": [0], "rank": 2}]},
    TokenizerFile: {"path": "a.model"},
    TrainedTokenizer: {"vocab_size": 400},
    AdamWConfig: BASE["training"]["optimizer"],
    MuonConfig: {**BASE["training"]["optimizer"], "kind": "muon", "momentum": 0.9},
    CosineSchedule: {"peak": 1e-3, "warmup_steps": 10, "floor": 0.1},
    ConstantSchedule: {"peak": 1e-3, "warmup_steps": 10},
    WsdSchedule: {"peak": 1e-3, "warmup_steps": 10, "decay_steps": 20, "floor": 0.1},
}

# Keys with a single value.
FIXED = {"data.held_out.source", "compute.xla.tpu", "compute.xla.gpu", "compute.xla.cpu"}

# Values of keys for which `another` would break a pattern or a rule between two keys.
CHOSEN = {
    "model.num_heads": 8,
    "model.num_kv_heads": 2,
    "model.head_dim": 32,
    "training.batch_size": 16,
    "training.accumulate": 2,
    "training.resume_from": "runs/a@5",
    "run.profile": "3:5",
}


def tag(member: type) -> str | None:
    kind = typing.get_type_hints(member).get("kind")
    return typing.get_args(kind)[0] if kind else None


def unwrap(hint: Any) -> tuple[Any, list]:
    """Returns the type inside `Annotated`, and its bounds and patterns."""
    marks = []
    while typing.get_origin(hint) is Annotated:
        hint, *more = typing.get_args(hint)
        marks += [m for field in more for m in getattr(field, "metadata", [field])]
    return hint, marks


def alternatives(hint: Any) -> tuple[Any, ...]:
    hint, _ = unwrap(hint)
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return tuple(unwrap(a)[0] for a in typing.get_args(hint)) if union else (hint,)


def item_of(hint: Any) -> type | None:
    """Returns the dataclass of which the type is a list."""
    item = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
    return item if dataclasses.is_dataclass(item) else None


def leaves(cls: type = Config, prefix: str = "", setup: tuple[str, ...] = ()):
    """Yields (setup, key, hint) of every key that holds a plain value.

    `setup` are the overrides that choose the members of sum types above the key.
    """
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        key = prefix + name
        members = [m for m in alternatives(hint) if dataclasses.is_dataclass(m) or item_of(m)]
        if not members:
            if name != "kind" and key not in FIXED:
                yield setup, key, hint
            continue
        for member in members:
            if item := item_of(member):
                yield from leaves(item, f"{key}.0.", setup)
                continue
            chosen = setup
            if member in MEMBERS:
                value = {"kind": tag(member)} if tag(member) else {}
                chosen = (*setup, f"{key}={json.dumps(value | MEMBERS[member])}")
            yield from leaves(member, f"{key}.", chosen)


def another(hint: Any, old: Any) -> Any:
    """Returns a valid value of the type that is not `old`."""
    options = [a for a in alternatives(hint) if a is not type(None)]
    inner, marks = unwrap(options[0])
    marks = marks + unwrap(hint)[1]
    if typing.get_origin(inner) is Literal:
        return next(v for v in typing.get_args(inner) if v != old)
    if typing.get_origin(inner) is tuple:
        item, _ = unwrap(typing.get_args(inner)[0])
        return {str: ["other"], int: [7]}.get(item, [["replica", "context"], None])
    if inner is bool:
        return not old
    if inner is str:
        return (old or "") + "x"
    if inner is int:
        top = [m.le for m in marks if isinstance(m, annotated_types.Le)]
        return 2 if old == -1 else old - 1 if old in top else (old or 0) + 1
    assert inner is float, hint
    return old / 2 if old else 0.125


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for name in value for k, v in flatten(value[name], f"{prefix}{name}.").items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return flatten({str(i): item for i, item in enumerate(value)}, prefix)
    return {prefix.removesuffix("."): value}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "base.yaml"
    path.write_text(json.dumps(BASE))  # YAML is a superset
    return path


LEAVES = list(leaves())


def test_every_member_and_every_chosen_key_exists():
    members = {m for m in vars(config).values() if dataclasses.is_dataclass(m) and tag(m)}
    assert members == {m for m in MEMBERS if tag(m)}
    assert {key for _, key, _ in LEAVES} >= set(CHOSEN)
    described = {key for key, _, _ in schema.describe_keys(Config) if not key.endswith("kind")}
    assert described >= {key for _, key, _ in LEAVES}


@pytest.mark.parametrize(
    ("setup", "key", "hint"),
    LEAVES,
    ids=[":".join([*re.findall(r'kind": "(\w+)', "".join(s)), k]) for s, k, _ in LEAVES],
)
def test_an_override_changes_its_key_and_no_other(recipe, setup, key, hint):
    before = flatten(recipes.to_dict(recipes.load(recipe, setup)))
    new = CHOSEN[key] if key in CHOSEN else another(hint, before[key])
    assert new != before[key]
    value = new if isinstance(new, str) else json.dumps(new)
    after = flatten(recipes.to_dict(recipes.load(recipe, [*setup, f"{key}={value}"])))
    assert after == {**before, key: new}


def test_options_of_xla_are_set_by_name_and_hashable(recipe):
    options = [
        "compute.xla.tpu.xla_a=32768",
        "compute.xla.tpu.xla_b=false",
        "compute.xla.cpu={c: x}",
    ]
    loaded = recipes.load(recipe, options).compute.xla
    assert (loaded.tpu, loaded.gpu, loaded.cpu) == (
        (("xla_a", 32768), ("xla_b", False)), (), (("c", "x"),),
    )  # fmt: skip
    assert isinstance(hash(loaded), int)
    assert dataclasses.replace(loaded, cpu={}).tpu == loaded.tpu
    saved = recipes.to_dict(loaded)
    assert saved == {"tpu": {"xla_a": 32768, "xla_b": False}, "gpu": {}, "cpu": {"c": "x"}}
    for wrong, said in (
        ("compute.xla.tpu.xla_a=[1, 2]", r"compute\.xla\.tpu: xla_a: expected a number"),
        ("compute.xla.tpu=[xla_a]", r"--compute\.xla\.tpu: expected the names of options"),
    ):
        with pytest.raises(UserError, match=said):
            recipes.load(recipe, [wrong])


def test_an_override_reads_numbers_and_words_as_people_write_them(recipe):
    loaded = recipes.load(
        recipe,
        ["training.schedule.peak=3e-4", "run.name=b-2", "data.held_out=[]", "eval.compare_xz=true"],
    )
    assert loaded.training.schedule.peak == 3e-4
    assert loaded.run.name == "b-2"
    assert loaded.data.held_out == ()
    assert loaded.eval.compare_xz is True


@pytest.mark.parametrize(
    "text",
    [
        *(
            "1e-3",
            "001",
            "48213",
            "3:5",
            "2024-01-01",
            "yes",
            "null",
            "",
            "=",
            "---",
            "\n\n",
            "é\n\t",
        ),
        *(
            "### Response:",
            "a: b",
            " a # b",
            "# a",
            "[a",
            "{a",
            "%s",
            "'a' or 'b'",
            '"a"',
            "| a",
            "*a",
        ),
        *("${run.name}", "${oc.env:HOME}"),
    ],
)
def test_any_text_is_taken_saved_and_read_as_it_is(recipe, tmp_path, text):
    loaded = recipes.load(recipe, [f"sample.prompt={text}"])
    assert loaded.sample.prompt == text
    (tmp_path / "saved.yaml").write_text(recipes.to_yaml(loaded))
    assert recipes.load(tmp_path / "saved.yaml") == loaded


def test_text_that_may_be_none_is_null_or_text(recipe):
    source = "data.train.0.source"
    kind = [f"{source}.kind=text", f"{source}.files=[a.txt]"]
    for text, wanted in (("---", "---"), ("\n\n", "\n\n"), ("null", None), ("~", "~"), ("", "")):
        loaded = recipes.load(recipe, [*kind, f"{source}.separator={text}"])
        assert loaded.data.train[0].source.separator == wanted


def test_an_item_of_a_list_of_texts_is_text(recipe):
    loaded = recipes.load(
        recipe,
        ["data.train.0.source={kind: text, files: [a]}", "data.train.0.source.files.0=1.txt: b"],
    )
    assert loaded.data.train[0].source.files == ("1.txt: b",)


def test_a_file_reads_numbers_and_words_as_people_write_them():
    text = "{a: 1e-3, b: 3:5, c: 2024-01-01, d: 1_000, e: 010, f: .5, g: ~, h: on, i: 0x10}"
    assert parse_yaml(text) == {
        "a": 1e-3, "b": "3:5", "c": "2024-01-01", "d": 1000, "e": "010", "f": 0.5, "g": None,
        "h": True, "i": 16,
    }  # fmt: skip


def test_another_kind_drops_the_keys_of_the_old_one(recipe):
    loaded = recipes.load(
        recipe,
        ["tokenizer.kind=file", "tokenizer.path=m.model", "tokenizer.kind=file"],
    )
    assert loaded.tokenizer == TokenizerFile(kind="file", path="m.model")


@pytest.mark.parametrize(
    ("overrides", "attention"),
    [
        (["attention.block=64"], AutoAttention(kind="auto", block=64)),
        (["attention.block=64", "attention.kind=blockwise"],
         BlockwiseAttention(kind="blockwise", block=64)),
        (["attention={kind: reference}"], ReferenceAttention(kind="reference")),
    ],
)  # fmt: skip
def test_a_member_that_the_recipe_leaves_out_is_of_the_default_kind(recipe, overrides, attention):
    loaded = recipes.load(recipe, [f"compute.{item}" for item in overrides])
    assert loaded.compute.attention == attention


def test_a_key_that_the_default_kind_lacks_still_needs_a_kind(recipe):
    for key in ("adapt.rank=4", "data.objective.rate=0.5"):
        with pytest.raises(UserError, match=r"needs a kind; allowed: '(none|causal)', "):
            recipes.load(recipe, [key])


def test_a_model_is_overridden_by_name_then_by_key(recipe):
    loaded = recipes.load(recipe, ["model.num_layers=3", "model=stories-15m"])
    assert loaded.model == recipes.load_model("stories-15m", ["num_layers=3"])


def test_a_model_may_be_another_with_changes(recipe, tmp_path):
    data = {**BASE, "model": {"base": "stories-15m", "max_length": 999, "rope": {"kind": "none"}}}
    path = tmp_path / "based.yaml"
    path.write_text(json.dumps(data))
    assert recipes.load(path).model == recipes.load_model("stories-15m", ["max_length=999"])
    wanted = recipes.load_model("stories-110m", ["max_length=999", "rope_theta=1e6"])
    assert recipes.load(path, ["model.rope_theta=1e6", "model.base=stories-110m"]).model == wanted
    assert recipes.load(path, ["model=stories-110m"]).model == recipes.load_model("stories-110m")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(recipes.to_yaml(recipes.load(recipe)))
    changed = recipes.load(path, [f"model.base={tmp_path / 'run'}"]).model
    assert changed == dataclasses.replace(recipes.load(recipe).model, max_length=999)
    with pytest.raises(UserError, match="model: no 'nothing'; shipped models"):
        recipes.load(path, ["model.base=nothing"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["training.stepz=3"],
            r"training\.stepz: unknown key; did you mean steps\? allowed: steps,",
        ),
        (["nothing=3"], r"nothing: unknown key; .*allowed: model, compute"),
        (["model.rope.factor=2"], r"model\.rope\.factor: unknown key; .*allowed: kind"),
        (["training.steps=many"], r'training\.steps: .*integer, not "many"'),
        (["training.steps=1.5"], r"training\.steps: .*integer, not 1\.5"),
        (["training.steps='7'"], r'training\.steps: .*integer, not "7"'),
        (["training.steps=010"], r'training\.steps: .*integer, not "010"'),
        (["model.tie_embeddings=1"], r"model\.tie_embeddings: .*boolean, not 1"),
        (["run={name: 3}"], r"run\.name: .*string, not 3"),
        (["training.steps=0"], r"training\.steps: .*greater than or equal to 1, not 0"),
        (["training.schedule.peak=-1"], r"training\.schedule\.peak: .*greater than 0, not -1"),
        (["training.optimizer.beta2=1"], r"training\.optimizer\.beta2: .*less than 1, not 1"),
        (["training.schedule.peak=.nan"], r"training\.schedule\.peak: "),
        (["run.name=a/b"], r"run\.name: .*pattern.*\"a/b\""),
        (["compute.dtype=float16"], r"compute\.dtype: .*'float32' or 'bfloat16', not \"float16\""),
        (["model.rope.kind=yarnn"], r"model\.rope: kind 'yarnn' is unknown; allowed: .*'linear'"),
        (["model.rope={}"], r"model\.rope: needs a kind; allowed: .*'linear'"),
        (["model.rope.kind=linear", "model.rope.factor=0.5"], r"factor: .*than or equal to 1, not"),
        (
            ["model.rope={kind: dynamic, factor: 2, original_length: 999999}"],
            r"rope\.original_length=999999 is above max_length=",
        ),
        (
            ["model.rope={kind: yarn, factor: 2, original_length: 1}"],
            r"rope\.factor=2 times rope\.original_length=1 does not reach max_length=",
        ),
        (
            ["model.rope={kind: yarn, factor: 64, original_length: 16, beta_fast: 1}"],
            r"beta_fast must be above beta_slow",
        ),
        (
            ["model.rope.kind=linear", "model.rope.factor=1e9"],
            r"factor: .*than or equal to 1000000",
        ),
        (
            ["model.rope={kind: yarn, factor: 64, original_length: 16}", "model.rope_theta=1"],
            r"rope\.kind=yarn needs a rope_theta above 1, not 1",
        ),
        (["model.rope.kind=linear"], r"^--model\.rope\.factor: is required and missing$"),
        (
            ["training.optimizer.kind=muon", "training.optimizer.eps=1e-8"],
            r"^--training\.optimizer\.momentum, --training\.optimizer\.beta1, .*beta2, .*_decay,"
            r" --training\.optimizer\.clip_norm: are required and missing$",
        ),
        (
            ["data.train.0.source.kind=text", "data.train.0.source.files.0=/x"],
            r"^--data\.train\.0\.source\.files: .*list does not exist yet: write '\[\"/x\"\]'$",
        ),
        (["mesh.replica=-1"], r"^mesh: replica and fsdp are -1 "),
        (["training.step=3"], r"^--training\.step: unknown key; did you mean steps\?"),
        (
            ["data.train.0.source={kind: text, files: [3]}"],
            r"^--data\.train\.0\.source\.files\.0: ",
        ),
        (
            ["data.train.0.source.kind=text", "data.train.0.source.files=/x/*.md"],
            r"--data\.train\.0\.source\.files: input should be a list, not \"/x/\*\.md\";"
            r" write '\[\"/x/\*\.md\"\]'",
        ),
        (["data.train=[]"], r"data\.train: .*at least 1"),
        (
            ["data.held_out=a.txt"],
            r"^--data\.held_out: expected a list of sources or \{from: train, ",
        ),
        (["data.held_out={from: train}"], r"^--data\.held_out\.one_in: is required and missing$"),
        (
            ["data.held_out={from: held_out, one_in: 9}"],
            r"\.held_out\.from: input should be 'train'",
        ),
        (
            ["data.held_out={from: train, one: 9}"],
            r"^--data\.held_out\.one: unknown key; did you mean one_in\? allowed: from, one_in",
        ),
        (["data.held_out.0.nam=b"], r"^--data\.held_out\.0\.nam: unknown key; did you mean name\?"),
        (["data.train.4.name=x"], r"data\.train\.4: a list of 1 takes an index below 1"),
        (["sharding.batch=[[pod]]"], r"sharding\.batch\.0\.0: .*'replica'.*not \"pod\""),
        (["model.num_kv_heads=3"], r"model: num_kv_heads=3 must divide num_heads=4"),
        (["model.head_dim=15"], r"model: head_dim=15 must be even"),
        (["mesh.fsdp=0"], r"mesh: sizes are at least 1"),
        (
            ["mesh.tensor=-1"],
            r"mesh: fsdp and tensor are -1 \(fsdp is unless it is set\)",
        ),
        (["training.resume_from=runs/a"], r"training: resume_from=runs/a: expected RUN@STEP"),
        (["training.accumulate=3"], r"training: accumulate=3 must divide batch_size=8"),
        (
            ["training.steps=5", "training.schedule.warmup_steps=10"],
            r"training: schedule: .* 10 steps.*steps=5",
        ),
        (["data.length=129"], r"data\.length=129 is above model\.max_length=128"),
        (["tokenizer.vocab_size=513"], r"tokenizer\.vocab_size=513 does not fit"),
        (
            ["model=llama-8b"],
            r"model: no 'llama-8b'; did you mean llama3-8b or .*`jllama info`",
        ),
        (["model=./gron"], r"model: ./gron: no such folder"),
        (["training.steps"], r"'training\.steps': an override is written key=value"),
        (["training.steps.x=1"], r"training\.steps\.x: training\.steps is a single value"),
        (["training.steps=[1"], r"training\.steps: '\[1' is not a YAML value"),
    ],
)
def test_a_mistake_is_one_line_with_the_key_and_what_is_allowed(recipe, overrides, expected):
    with pytest.raises(UserError) as caught:
        recipes.load(recipe, overrides)
    message = str(caught.value)
    assert re.search(expected, message), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "no such file"),
        ("a: [1", "not readable as YAML"),
        ("run: {name: a}\nrun: {name: b}\n", "'run' appears twice"),
        ("[" * 10_000, "nested too deeply"),
        ("- 1\n- 2\n", "expected keys and values"),
        ("", "model, compute, tokenizer, data, training, run: are required and missing"),
        ("training: {steps: 3}\n", "training.batch_size, "),
        ("training: {stepz: 3}\n", "training.stepz: unknown key"),
        ("run: {name: ${nowhere}}\n", "not readable as YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, expected):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        recipes.load(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mistake", "said", "ways"),
    [
        (["data.objective.rate=0.5"], "'infill', 'reply'", [["data.objective.kind=infill"]]),
        (
            ["tokenizer={kind: file, path: x}", "tokenizer.kind=train"],
            "--tokenizer.vocab_size: is required",
            [["tokenizer.vocab_size=300"]],
        ),
        (["adapt.kind=lora"], "--adapt.rank, --adapt.alpha: are required",
         [["adapt.rank=2", "adapt.alpha=4"]]),
        (["adapt={kind: lora, rank: 2, alpha: 4}", "training.init_from="],
         "needs training.init_from", [["training.init_from=base"]]),
        (["mesh.tensor=-1"], "fsdp and tensor are -1 (fsdp is unless it is set), .*: set the other",
         [["mesh.fsdp=1"]]),
        (["data.objective.kind=reply", "data.packing.kind=cut"],
         "objective.kind=reply: needs packing.kind=whole", [["data.packing.kind=whole"]]),
        (["data.length=200"], "is above model.max_length=128",
         [["data.length=128"], ["model.max_length=200"]]),
        (["sample.max_new_tokens=128"], "leaves no room for a prompt in model.max_length=128",
         [["sample.max_new_tokens=127"], ["model.max_length=129"]]),
        (["model.rope={kind: yarn, factor: 2, original_length: 32}"],
         "raise the factor, or correct the original length",
         [["model.rope.factor=4"], ["model.rope.original_length=64"]]),
        (["run={name: 3}"], "not 3; put text that YAML reads as something else in double quotes",
         [['run={name: "3"}']]),
        (["adapt={kind: lora, rank: 2, alpha: 4, overrides: [{match: q}]}"],
         "sets neither rank nor alpha", [["adapt.overrides.0.rank=1"]]),
    ],
)  # fmt: skip
def test_the_key_that_a_mistake_names_mends_it(recipe, mistake, said, ways):
    with pytest.raises(UserError, match=re.escape(said).replace(r"\.\*", ".*")):
        recipes.load(recipe, mistake)
    for way in ways:
        recipes.load(recipe, [*mistake, *way])


def test_a_list_can_be_written_as_the_error_says(recipe):
    loaded = recipes.load(
        recipe, ["data.train.0.source.kind=text", 'data.train.0.source.files=["**/*.md"]']
    )
    assert loaded.data.train[0].source.files == ("**/*.md",)


def test_a_model_for_a_recipe_and_a_recipe_for_a_model_are_told_apart():
    folder = recipes.configs_folder()
    with pytest.raises(UserError, match=r"train/tiny\.yaml: is a recipe; .* is a model: a name"):
        recipes.load_model(str(folder / "train" / "tiny.yaml"))
    model = folder / "model" / "stories-15m.yaml"
    with pytest.raises(UserError, match=r"is a model; .*, such as configs/\S+, with --m") as error:
        recipes.load(model)
    shown, given = re.search(r"such as configs/(\S+), with --(\S+)", str(error.value)).groups()
    assert recipes.load(folder / shown, [given]).model == recipes.load_model("stories-15m")


@pytest.mark.parametrize(
    "path", sorted((recipes.configs_folder() / "train").glob("*.yaml")), ids=lambda p: p.stem
)
def test_a_saved_recipe_loads_to_an_equal_one(path, tmp_path):
    loaded = recipes.load(path)
    saved = tmp_path / "config.yaml"
    saved.write_text(recipes.to_yaml(loaded))
    again = recipes.load(saved)
    assert again == loaded == recipes.validate(Config, recipes.to_dict(loaded), "test")
    assert hash(again) == hash(loaded)


def test_the_docs_extend_a_large_model_with_the_papers_training(tmp_path):
    page = (recipes.configs_folder().parent / "docs" / "long-context.md").read_text()
    command = re.search(r"```\npython train\.py (.*?--run\.name=longer.*?)```", page, re.S)[1]
    model = recipes.configs_folder() / "model" / "llama2-7b.yaml"
    words = shlex.split(
        command.replace("\\\n", " ").replace("base=models/llama2-7b", f"base={model}")
    )
    words[1] = str(recipes.configs_folder().parent / words[1])
    loaded = recipes.from_arguments(words, None)
    assert loaded.model == dataclasses.replace(
        recipes.load_model("llama2-7b"),
        max_length=16384,
        rope=LinearRopeScaling(kind="linear", factor=4.0),
    )
    training = loaded.training
    assert (training.optimizer.kind, training.schedule.peak, training.steps) == (
        "adamw",
        2e-5,
        1000,
    )


def test_configs_are_frozen_and_serve_as_keys():
    model = recipes.load_model("tiny")
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.num_layers = 3
    assert {model: "found"}[recipes.load_model("tiny")] == "found"
    assert dataclasses.replace(model, num_layers=99) not in {model}


def test_constructing_a_config_in_code_is_validated_too():
    values = recipes.to_dict(recipes.load_model("tiny"))
    with pytest.raises(ValueError, match="must divide"):
        ModelConfig(**{**values, "num_kv_heads": values["num_heads"] + 1})


def test_every_key_is_described():
    for key, kind, meaning in schema.describe_keys(Config):
        assert key
        assert kind
        assert meaning, f"{key} has no meaning"
