"""The engine: decoding with the cache, many requests at a time."""

import dataclasses

import numpy as np
import pytest
import reference
import tiny

from jllama.errors import UserError
from jllama.generate import engine
from jllama.generate.engine import Request
from jllama.generate.sampling import Sampling
from jllama.model.rope import turns

MODEL = tiny.config(**tiny.VARIANTS["llama3.1"] | {"max_length": 128, "num_layers": 2})
COMPUTE = tiny.compute()
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def params():
    return tiny.params(MODEL, 6.0)


def prompt(length, seed=0):
    return tuple(tiny.tokens(length, seed=seed).tolist())


def generate(params, *requests, model=MODEL, **kwargs):
    return engine.generate(params, model, COMPUTE, requests, **kwargs)


def step_by_step(params, ids, count, penalty=1.0, below=97, model=MODEL):
    """Greedy decoding with a whole forward pass for each token, in a row of fixed length.

    RoPE that depends on the length is that of the text in the end.
    """
    angles = turns(model, len(ids) + count)
    ids, start = list(ids), len(ids)
    while len(ids) < start + count:
        row = np.zeros((1, 64), np.int32)
        row[0, : len(ids)] = ids
        scores = tiny.logits(params, model, row, turns=angles)[0, len(ids) - 1, :below].copy()
        for token in set(ids):
            scores[token] *= 1 / penalty if scores[token] > 0 else penalty
        ids.append(int(scores.argmax()))
    return ids[start:]


def test_greedy_is_the_argmax_of_the_full_forward_for_ragged_prompts(params):
    prompts = [prompt(n, seed=n) for n in (1, 5, 33)]
    got = generate(
        params, *(Request(prompt=p, max_new_tokens=20, sampling=GREEDY) for p in prompts)
    )
    assert got == [step_by_step(params, p, 20) for p in prompts]
    assert len({token for row in got for token in row}) > 5  # a model that says something


@pytest.mark.parametrize("rope", [tiny.DYNAMIC, tiny.ADAPTIVE2, tiny.YARN], ids=lambda r: r.kind)
def test_greedy_is_the_argmax_under_every_kind_of_rope_and_for_texts_of_several_lengths(
    params, rope, monkeypatch
):
    model = dataclasses.replace(MODEL, rope=rope, max_length=256)
    read, prefill = [], engine._prefill
    monkeypatch.setattr(engine, "_prefill", lambda *a: read.append(len(a[4])) or prefill(*a))
    # One prompt twice, for texts of another length and of the same.
    sizes = ((5, 12), (20, 6), (20, 40), (20, 40))
    requests = [
        Request(prompt=prompt(n, seed=n), max_new_tokens=new, sampling=GREEDY) for n, new in sizes
    ]
    got = generate(params, *requests, model=model)
    assert got == [step_by_step(params, r.prompt, r.max_new_tokens, model=model) for r in requests]
    assert read == [2 if rope.kind == "yarn" else 3]
    if rope.kind == "dynamic":
        assert got[1] != got[2][:6]  # here the length decides
    engine.traces.clear()
    others = [dataclasses.replace(r, max_new_tokens=r.max_new_tokens - 1) for r in requests]
    generate(params, *others, model=model)
    assert not engine.traces  # another length compiles nothing


def test_keys_that_are_turned_anew_for_each_length_reproduce_chinese_llama(params):
    rope = dataclasses.replace(tiny.ADAPTIVE2, growing=True)
    model = dataclasses.replace(MODEL, rope=rope, max_length=256)
    assert rope.original_length < 50
    requests = [
        Request(prompt=prompt(n, seed=n), max_new_tokens=new, sampling=GREEDY)
        for n, new in ((5, 60), (40, 30), (40, 50), (90, 20))
    ]
    got = generate(params, *requests, model=model)
    wanted = [reference.growing(params, model, r.prompt, r.max_new_tokens) for r in requests]
    assert got == wanted
    assert got[1] == got[2][:30]  # what comes later changes nothing
    fixed = dataclasses.replace(model, rope=tiny.ADAPTIVE2)
    assert generate(params, *requests, model=fixed) != wanted


def test_repetition_penalty_counts_prompt_and_generated_tokens_and_no_padding(params):
    sampling = Sampling(temperature=0.0, repetition_penalty=1.5)
    prompts = [prompt(n, seed=n) for n in (2, 30)]
    got = generate(
        params, *(Request(prompt=p, max_new_tokens=16, sampling=sampling) for p in prompts)
    )
    wanted = [step_by_step(params, p, 16, penalty=1.5) for p in prompts]
    assert got == wanted
    assert wanted[0] != step_by_step(params, prompts[0], 16)


def test_padding_is_not_a_seen_token(params, monkeypatch):
    seen = []
    prefill = engine._prefill
    monkeypatch.setattr(engine, "_prefill", lambda *args: keep(prefill(*args)))

    def keep(result):
        seen[:] = [set(np.flatnonzero(row).tolist()) for row in np.asarray(result[1])]
        return result

    prompts = [(5, 6, 7), prompt(40)]
    generate(params, *(Request(prompt=p, max_new_tokens=1) for p in prompts))
    assert seen == [set(p) for p in prompts]
    assert 0 not in seen[0]  # the padding id


def test_prompts_longer_than_a_chunk_are_read_in_chunks(params, monkeypatch):
    requests = [
        Request(prompt=prompt(n, seed=n), max_new_tokens=6, sampling=GREEDY) for n in (4, 60, 90)
    ]
    whole = generate(params, *requests)
    monkeypatch.setattr(engine, "LARGEST_CHUNK", 32)
    assert generate(params, *requests) == whole


@pytest.mark.optimized
def test_a_request_is_a_function_of_itself_and_not_of_its_batch(params):
    sampling = Sampling(temperature=1.0, top_p=0.9)
    one = Request(prompt=prompt(7), max_new_tokens=16, sampling=sampling, seed=3)
    others = [
        Request(prompt=prompt(40, seed=1), max_new_tokens=30, seed=3),
        Request(prompt=prompt(2, seed=2), max_new_tokens=3, sampling=GREEDY),
    ]
    alone = generate(params, one)[0]
    assert generate(params, others[0], one, others[1])[1] == alone
    assert generate(params, one)[0] == alone


def test_seed_number_and_prompt_each_change_the_draws(params):
    flat = {**params, "head": {"weight": params["head"]["weight"] * 0}}  # uniform over the ids
    one = Request(prompt=prompt(4), max_new_tokens=12)
    other = [
        dataclasses.replace(one, seed=1),
        dataclasses.replace(one, number=1),
        dataclasses.replace(one, prompt=prompt(4, seed=9)),
    ]
    drawn = generate(flat, one, *other)
    assert len({tuple(row) for row in drawn}) == 4
    assert len({token for row in drawn for token in row}) > 20


def test_a_stop_id_ends_its_own_request_only_and_is_not_part_of_it(params):
    plain = Request(prompt=prompt(5), max_new_tokens=20, sampling=GREEDY)
    free = generate(params, plain)[0]
    stop = next(t for i, t in enumerate(free) if i >= 3 and t not in free[:i])
    at = free.index(stop)
    stopped = dataclasses.replace(plain, stop=frozenset({stop, 96}))
    assert generate(params, stopped, plain) == [free[:at], free]
    ends = [e for e in engine.stream(params, MODEL, COMPUTE, [stopped, plain]) if e.token is None]
    assert [(e.index, e.finish_reason) for e in ends] == [(0, "stop"), (1, "length")]


def test_logprobs_are_those_of_the_model_whatever_the_sampling(params):
    wild = Sampling(temperature=3.0, top_k=40, top_p=0.9, repetition_penalty=1.5)
    settings = (GREEDY, Sampling(), wild)
    requests = [
        Request(prompt=tuple(range(n)), max_new_tokens=12, sampling=sampling)
        for n, sampling in zip((1, 5, 33), settings, strict=True)
    ]
    events = list(engine.stream(params, MODEL, COMPUTE, requests, vocab_size=90))
    for i, request in enumerate(requests):
        drawn = [event for event in events if event.index == i and event.token is not None]
        ids = [*request.prompt, *(event.token for event in drawn)]
        # All 97 logits count, also those of ids that are never drawn.
        scores = reference.logits(params, MODEL, [ids])[0, len(request.prompt) - 1 : -1]
        wanted = scores[range(12), ids[-12:]] - np.log(np.exp(scores).sum(-1))
        np.testing.assert_allclose([event.logprob for event in drawn], wanted, rtol=1e-4, atol=1e-4)


def test_a_cancelled_request_draws_no_more_and_the_others_go_on(params):
    requests = [Request(prompt=prompt(5, seed=i), max_new_tokens=9, seed=i) for i in range(3)]
    whole, cancelled, drawn = generate(params, *requests), set(), [[], [], []]
    for event in engine.stream(params, MODEL, COMPUTE, requests, cancelled=cancelled):
        drawn[event.index].append(event.token)
        if event.index == 2 and len(drawn[2]) == 3:
            cancelled.update({0, 2})  # in the middle of a step, and at the end of one
    assert drawn == [whole[0][:3], [*whole[1], None], whole[2][:3]]


def test_decoding_ends_with_the_last_request(params, monkeypatch):
    request = Request(prompt=prompt(5), max_new_tokens=100, sampling=GREEDY)
    first = generate(params, dataclasses.replace(request, max_new_tokens=1))[0][0]
    steps = []
    decode = engine._decode
    monkeypatch.setattr(engine, "_decode", lambda *args: steps.append(1) or decode(*args))
    assert generate(params, dataclasses.replace(request, stop=frozenset({first}))) == [[]]
    assert len(steps) <= 1  # the one already under way
    steps.clear()
    generate(params, dataclasses.replace(request, max_new_tokens=5))
    assert len(steps) == 4


def test_streaming_yields_what_generate_returns_and_ends_each_request(params):
    requests = [
        Request(prompt=prompt(5, seed=i), max_new_tokens=n, seed=i) for i, n in enumerate((3, 0, 9))
    ]
    events = list(engine.stream(params, MODEL, COMPUTE, requests))
    for i, wanted in enumerate(generate(params, *requests)):
        mine = [event for event in events if event.index == i]
        assert [event.token for event in mine] == [*wanted, None]
        assert [event.finish_reason for event in mine] == [None] * len(wanted) + ["length"]
    assert [len(x) for x in generate(params, *requests)] == [3, 0, 9]


def test_streaming_comes_as_it_is_made(params, monkeypatch):
    steps = []
    decode = engine._decode
    monkeypatch.setattr(engine, "_decode", lambda *args: steps.append(1) or decode(*args))
    events = engine.stream(params, MODEL, COMPUTE, [Request(prompt=(1,), max_new_tokens=50)])
    for count in range(1, 6):
        next(events)
        assert len(steps) == count


def test_each_bucket_is_compiled_once_whatever_the_prompts_and_settings(params):
    model = dataclasses.replace(MODEL, max_length=1024)  # none of this is compiled yet

    def run(length, new, sampling=GREEDY, **kwargs):
        request = Request(prompt=prompt(length), max_new_tokens=new, sampling=sampling, **kwargs)
        engine.generate(params, model, COMPUTE, [request])

    engine.traces.clear()
    run(3, 9)
    assert engine.traces == {"prefill": 1, "first": 1, "decode": 1}
    run(20, 11, Sampling(temperature=0.7, top_k=5, top_p=0.4, repetition_penalty=1.1), seed=9)
    run(31, 1, stop=frozenset({1, 2, 3}))
    run(16, 16)
    assert engine.traces == {"prefill": 1, "first": 1, "decode": 1}
    run(20, 13)  # a longer cache
    assert engine.traces == {"prefill": 2, "first": 1, "decode": 2}
    run(33, 31)  # a longer prompt in it
    run(64, 0)
    assert engine.traces == {"prefill": 3, "first": 1, "decode": 2}


def test_only_ids_below_the_vocabulary_are_drawn(params):
    flat = {**params, "head": {"weight": params["head"]["weight"] * 0}}
    request = Request(prompt=(1, 2), max_new_tokens=60)
    assert max(generate(flat, request, vocab_size=10)[0]) == 9
    got = generate(params, dataclasses.replace(request, sampling=GREEDY), vocab_size=10)
    assert got == [step_by_step(params, (1, 2), 60, below=10)]


def test_several_requests_of_one_prompt_share_its_prefill(params, monkeypatch):
    rows = []
    prefill = engine._prefill
    monkeypatch.setattr(engine, "_prefill", lambda *a: rows.append(len(a[4])) or prefill(*a))
    one = Request(prompt=prompt(9), max_new_tokens=12)
    many = [dataclasses.replace(one, number=n) for n in range(3)]
    other = Request(prompt=prompt(4, seed=5), max_new_tokens=12)
    got = generate(params, many[0], other, many[1], many[2])
    assert rows == [2]
    assert got == [generate(params, r)[0] for r in (many[0], other, many[1], many[2])]
    assert len({tuple(got[i]) for i in (0, 2, 3)}) == 3


def test_a_prompt_may_fill_the_model_to_its_last_position(params):
    request = Request(prompt=prompt(100), max_new_tokens=28, sampling=GREEDY)
    short = Request(prompt=prompt(3), max_new_tokens=2, sampling=GREEDY)
    got = generate(params, short, request)
    assert [len(x) for x in got] == [2, 28]
    assert got[0] == step_by_step(params, short.prompt, 2)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(prompt=prompt(100), max_new_tokens=29), "100 tokens and 29 new ones exceed"),
        (Request(prompt=(), max_new_tokens=2), "prompt 1 is empty"),
        (Request(prompt=(1, 97), max_new_tokens=2), "prompt 1: id 97 is not in the vocabulary"),
        (Request(prompt=(-1,), max_new_tokens=2), "id -1"),
        (Request(prompt=(1,), max_new_tokens=-2), "max_new_tokens=-2"),
        (Request(prompt=(1,), max_new_tokens=2, seed=-1), "seed=-1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_requests_are_one_line_before_anything_runs(params, request_, said):
    good = Request(prompt=(1,), max_new_tokens=2)
    with pytest.raises(UserError, match=said) as error:
        engine.stream(params, MODEL, COMPUTE, [good, request_])
    assert "\n" not in str(error.value)
