"""The counts and the modelled time of a program that can be followed by hand."""
# ruff: noqa: E501 (lines of HLO)

import textwrap

import pytest

from jllama.chips import Chip
from jllama.plan import hlo
from jllama.plan.collective import members_of
from jllama.plan.program import Links, collectives, modelled_step

# A matrix unit of 1 FLOP a cycle at 1 Hz; four links of 100 B/s.
CHIP = Chip("toy", 1, ici_bandwidth=400, dcn_bandwidth=10, torus=2, flops_per_cycle=1)


def cycles(n):
    return f', backend_config={{"estimated_cycles":"{n}"}}'


def module(body):
    return "HloModule toy, is_scheduled=true\n\n" + textwrap.dedent(body)


LOOP = module("""\
    %less (state: (s32[], f32[100])) -> pred[] {
      %state = (s32[]{:T(128)}, f32[100]{0}) parameter(0)
      %limit = s32[] constant(LIMIT)
      %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
      ROOT %less = pred[] compare(%counter, %limit), direction=LT
    }

    %body (state: (s32[], f32[100])) -> (s32[], f32[100]) {
      %state.1 = (s32[]{:T(128)}, f32[100]{0}) parameter(0)
      %counter.1 = s32[] get-tuple-element(%state.1), index=0
      %step = s32[] constant(STEP)
      %next = s32[] add(%counter.1, %step)
      %value = f32[100]{0} get-tuple-element(%state.1), index=1
      %sum = f32[100]{0} all-reduce(%value), replica_groups={{0,1},{2,3}}, to_apply=%add
      %copied = s32[] copy(%next)
      ROOT %out = (s32[], f32[100]{0}) tuple(%copied, %sum)
    }

    ENTRY %main (x: f32[100]) -> f32[100] {
      %x = f32[100]{0} parameter(0)
      %start = s32[] constant(START)
      %init = (s32[], f32[100]{0}) tuple(%start, %x)
      %loop = (s32[], f32[100]{0}) while(%init), condition=%less, body=%body
      ROOT %result = f32[100]{0} get-tuple-element(%loop), index=1
    }
""")


@pytest.mark.parametrize(
    "start,limit,step,trips", [(0, 6, 1, 6), (0, 6, 2, 3), (1, 6, 2, 3), (2, 6, 1, 4), (6, 6, 1, 0)]
)
def test_a_loop_runs_by_its_limit_its_start_and_its_step(start, limit, step, trips):
    text = LOOP.replace("START", str(start)).replace("LIMIT", str(limit)).replace("STEP", str(step))
    (found,) = collectives(text)
    assert (found.kind, found.times, found.ways, found.array.shape) == (
        "all-reduce", trips, 2, (100,),
    )  # fmt: skip
    # An all-reduce over two devices sends each byte once: 400 bytes over 400 B/s.
    assert modelled_step(text, CHIP).seconds == trips


def test_the_compilers_own_count_of_trips_comes_first():
    known = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    (found,) = collectives(known.replace("START", "0").replace("LIMIT", "6").replace("STEP", "1"))
    assert found.times == 5


def test_a_loop_without_a_counter_counts_as_one_trip():
    text = (
        LOOP.replace("constant(START)", "parameter(1)").replace("LIMIT", "6").replace("STEP", "1")
    )
    (found,) = collectives(text)
    assert found.times == 1
    parsed = hlo.parse(text)
    (loop,) = (i for i in parsed.computations["main"] if i.opcode == "while")
    with pytest.raises(ValueError, match="loop has no counter"):
        hlo.trips(parsed, "main", loop)


OVERLAP = module(f"""\
    ENTRY %main (x: bf16[100]) -> bf16[400] {{
      %x = bf16[100]{{0}} parameter(0)
      %start = (bf16[100]{{0}}, bf16[400]{{0}}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={{0}}
      %first = bf16[100]{{0}} fusion(%x), kind=kLoop, calls=%f{cycles(1)}
      %all = bf16[400]{{0}} all-gather-done(%start)
      %second = bf16[400]{{0}} fusion(%all), kind=kLoop, calls=%f{cycles(2)}
      %part = bf16[100]{{0}} reduce-scatter(%second), replica_groups=[1,4]<=[4], dimensions={{0}}, to_apply=%add
      ROOT %third = bf16[100]{{0}} fusion(%part), kind=kLoop, calls=%f{cycles(4)}
    }}
""")


def test_an_asynchronous_collective_takes_time_only_beyond_what_runs_meanwhile():
    step = modelled_step(OVERLAP, CHIP)
    gather, scatter = step.collectives
    assert gather.asynchronous and not scatter.asynchronous
    assert (gather.array.bytes, gather.sent) == (800, 600)
    assert (scatter.array.bytes, scatter.sent) == (800, 600)  # the whole array, of which 3/4 leave
    assert step.cycles == 1 + 2 + 4
    # The gather takes 1.5 s, of which 1 s is covered; the scatter takes 1.5 s.
    assert step.exposed == {("all-gather", True): 0.5, ("reduce-scatter", False): 1.5}
    assert step.seconds == 7 + 0.5 + 1.5
    assert modelled_step(OVERLAP, CHIP, share=0.5).seconds == 7 + 2 + 3


def test_a_fusion_without_an_estimate_is_counted_and_takes_no_time():
    step = modelled_step(OVERLAP.replace(cycles(4), cycles(2**63 - 1)), CHIP)
    assert (step.cycles, step.unestimated) == (1 + 2, 1)
    assert step.seconds == 3 + 0.5 + 1.5
    assert modelled_step(OVERLAP, CHIP).unestimated == 0


PERMUTES = module(f"""\
    ENTRY %main (x: f32[100]) -> f32[100] {{
      %x = f32[100]{{0}} parameter(0)
      %a = (f32[100]{{0}}, f32[100]{{0}}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{{{0,1}},{{1,0}}}}
      %b = (f32[100]{{0}}, f32[100]{{0}}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{{{1,0}},{{0,1}}}}
      %c = f32[100]{{0}} collective-permute-done(%a)
      %d = f32[100]{{0}} collective-permute-done(%b)
      ROOT %e = f32[100]{{0}} fusion(%c, %d), kind=kLoop, calls=%f{cycles(1)}
    }}
""")


SQUARE = [(x, y, 0) for x in range(2) for y in range(2)]


@pytest.mark.parametrize(
    "groups,dimensions",
    [
        ("{{0,1},{2,3}}", (1,)),
        ("{{0,2},{1,3}}", (0,)),
        ("{{0,1,2,3}}", (0, 1)),
        ("[2,2]<=[2,2]T(1,0)", (0,)),
        ("[2,2]<=[4]", (1,)),
        ("mesh['a'=2,'b'=2] {'a'}", (0,)),
        ("mesh['a'=2,'b'=2] {'a','b'}", (0, 1)),
        ("{}", (0, 1)),  # not said: all links
    ],
)
def test_a_collective_has_the_links_of_the_dimensions_that_it_spans(groups, dimensions):
    assert Links.of(CHIP, places=SQUARE).along(members_of(groups)) == dimensions
    assert Links.of(CHIP).along(members_of(groups)) == (0, 1)


STAGES = module("""\
    ENTRY %main (x: f32[2,100]) -> f32[100] {
      %x = f32[2,100]{1,0} parameter(0)
      %a = ((f32[2,100]{1,0}), f32[1,100]{1,0}) call-start(%x), to_apply=%along.1
      %b = ((f32[2,100]{1,0}), f32[1,100]{1,0}) call-start(%x), to_apply=%along.2
      %c = f32[1,100]{1,0} call-done(%a)
      ROOT %d = f32[1,100]{1,0} call-done(%b)
    }

    %along.1 (x: f32[2,100]) -> f32[1,100] {
      %x.1 = f32[2,100]{1,0} parameter(0)
      ROOT %r.1 = f32[1,100]{1,0} reduce-scatter(%x.1), replica_groups={{0,1},{2,3}}, to_apply=%add
    }

    %along.2 (x: f32[2,100]) -> f32[1,100] {
      %x.2 = f32[2,100]{1,0} parameter(0)
      ROOT %r.2 = f32[1,100]{1,0} reduce-scatter(%x.2), replica_groups={{0,2},{1,3}}, to_apply=%add
    }
""")


def test_collectives_along_other_dimensions_run_at_the_same_time():
    # 400 bytes over the two links of one dimension, at 200 B/s; over all four, one after the other.
    assert modelled_step(STAGES, CHIP, places=SQUARE).seconds == 2.0
    assert modelled_step(STAGES, CHIP).seconds == 1.0 + 1.0
    along_one = STAGES.replace("{{0,2},{1,3}}", "{{0,1},{2,3}}")
    assert modelled_step(along_one, CHIP, places=SQUARE).seconds == 4.0


def test_permutes_along_other_links_run_at_the_same_time():
    step = modelled_step(PERMUTES, CHIP)
    assert [c.sent for c in step.collectives] == [400, 400]
    assert step.seconds == 400 / 100 + 1


CHAIN = module(f"""\
    %piece.1 (x: f32[400]) -> f32[400] {{
      %x.1 = f32[400]{{0}} parameter(0)
      %mark = f32[] custom-call(), custom_call_target="AsyncCollectiveStart"
      ROOT %r.1 = f32[400]{{0}} all-reduce(%x.1), replica_groups={{{{0,1,2,3}}}}, frontend_attributes={{chain_id="7"}}, to_apply=%add
    }}

    %piece.2 (x: f32[400]) -> f32[400] {{
      %x.2 = f32[400]{{0}} parameter(0)
      %mark.2 = f32[] custom-call(), custom_call_target="AsyncCollectiveDone"
      ROOT %r.2 = f32[400]{{0}} all-reduce(%x.2), replica_groups={{{{0,1,2,3}}}}, frontend_attributes={{chain_id="7"}}, to_apply=%add
    }}

    %all-reduce-scatter.1 (x: f32[400]) -> f32[100] {{
      %x.3 = f32[400]{{0}} parameter(0)
      %whole = f32[400]{{0}} all-reduce(%x.3), replica_groups={{{{0,1,2,3}}}}, to_apply=%add
      ROOT %own = f32[100]{{0}} slice(%whole), slice={{[0:100]}}
    }}

    ENTRY %main (x: f32[400]) -> f32[100] {{
      %x = f32[400]{{0}} parameter(0)
      %begin = f32[400]{{0}} fusion(%x), kind=kOutput, calls=%piece.1{cycles(2)}
      %end = f32[400]{{0}} fusion(%begin), kind=kOutput, calls=%piece.2{cycles(3)}
      ROOT %scattered = f32[100]{{0}} fusion(%end), kind=kCustom, calls=%all-reduce-scatter.1
    }}
""")


def test_a_chain_of_fusions_is_one_collective_and_a_fused_slice_makes_a_reduce_scatter():
    step = modelled_step(CHAIN, CHIP)
    chain, scatter = step.collectives
    assert (chain.kind, chain.asynchronous, chain.sent) == ("all-reduce", True, 2400)
    assert (scatter.kind, scatter.asynchronous, scatter.sent) == ("reduce-scatter", False, 1200)
    assert step.exposed == {("all-reduce", True): 1.0, ("reduce-scatter", False): 3.0}
    assert step.seconds == 2 + 3 + 1 + 3


SPARSE_CORE = module(f"""\
    %called (x: f32[4,100]) -> f32[1,100] {{
      %x.1 = f32[4,100]{{1,0}} parameter(0)
      ROOT %part = f32[1,100]{{1,0}} reduce-scatter(%x.1), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, to_apply=%add
    }}, execution_thread="sparsecore"

    ENTRY %main (x: f32[4,100]) -> f32[1,100] {{
      %x = f32[4,100]{{1,0}} parameter(0)
      %start = ((f32[4,100]{{1,0}}), f32[1,100]{{1,0}}) call-start(%x), async_execution_thread="sparsecore", to_apply=%called
      %work = f32[4,100]{{1,0}} fusion(%x), kind=kLoop, calls=%f{cycles(2)}
      ROOT %done = f32[1,100]{{1,0}} call-done(%start)
    }}
""")


def test_a_collective_on_the_sparse_core_is_asynchronous():
    step = modelled_step(SPARSE_CORE, CHIP)
    (scatter,) = step.collectives
    assert (scatter.kind, scatter.asynchronous, scatter.sent) == ("reduce-scatter", True, 1200)
    assert step.seconds == 3 and step.exposed == {("reduce-scatter", True): 1.0}


def test_a_transfer_whose_operands_follow_its_start_begins_with_them():
    """As libtpu 0.0.46 writes it: a start without operands, and an update that has them."""
    updated = SPARSE_CORE.replace(
        "call-start(%x), ", "call-start(), "
    ).replace(
        "%work",
        f"""%before = f32[4,100]{{1,0}} fusion(%x), kind=kLoop, calls=%f{cycles(2)}
  %update = ((f32[4,100]{{1,0}}), f32[1,100]{{1,0}}) call-update(%start, %before)
  %work""",
    ).replace("call-done(%start)", "call-done(%update)")  # fmt: skip
    assert updated.count("update") == 3
    step = modelled_step(updated, CHIP)
    (scatter,) = step.collectives
    assert (scatter.kind, scatter.asynchronous, scatter.sent) == ("reduce-scatter", True, 1200)
    assert step.seconds == 2 + 3 and step.exposed == {("reduce-scatter", True): 1.0}


def test_types_are_read_whole():
    assert [a.bytes for a in hlo.arrays("(f32[2,3]{1,0:T(8,128)}, pred[4], s4[8], f8e4m3fn[2], u32[])")] == [
        24, 4, 4, 2, 4,
    ]  # fmt: skip
    assert hlo.tuple_elements("((f32[2], s32[3]{0}), bf16[2,3]{1,0})") == [
        "(f32[2], s32[3]{0})",
        "bf16[2,3]{1,0}",
    ]
