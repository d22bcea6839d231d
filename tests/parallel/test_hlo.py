"""Collectives are read from HLO as often as their loops run, and given to their mesh axes."""

import pytest

from klong_jax.parallel.hlo import collectives, sent_by_axes

MESH = {"fsdp": 2, "context": 4}

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[4,8]) -> bf16[8,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, dimensions={0}
}

%body (state: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %state = (s32[], bf16[4,8]) parameter(0)
  %kernel = bf16[4,8]{1,0} custom-call(%state), custom_call_target="tpu_custom_call", backend_config={"x": {
 "more": 1
}}, metadata={op_name="kernel"}
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%kernel), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, dimensions={0}
  %fusion = bf16[8,8]{1,0} fusion(%kernel), kind=kLoop, calls=%fused
  %scatter = f32[4]{0} reduce-scatter(%kernel), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = (s32[], bf16[4,8]) tuple(%state, %kernel)
}

%condition (state: (s32[], bf16[4,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  %state.1 = (s32[], bf16[4,8]) parameter(0)
  %index = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%index, %bound), direction=LT
}

ENTRY %main (x: bf16[4,8]) -> f32[10] {
  %x = bf16[4,8]{1,0} parameter(0)
  %loop = (s32[], bf16[4,8]) while(%x), condition=%condition, body=%body
  %all-reduce = (f32[10]{0}, f32[6]{0}) all-reduce(%x, %x), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %permute = bf16[4,8]{1,0} collective-permute(%x), channel_id=4, source_target_pairs={{0,0},{1,2},{2,1}}
  ROOT %gather = f32[10]{0} all-gather(%x), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}
"""  # noqa: E501


def test_exchanges_count_as_often_as_their_loops_run() -> None:
    found = sorted(
        (one.kind, one.axes, one.sent_bytes, one.times) for one in collectives(TEXT, MESH)
    )
    assert found == [
        # The copy in the fusion is the same exchange; the one after the loop is another.
        ("all-gather", "fsdp", 20.0, 1),
        ("all-gather", "fsdp", 64.0, 5),
        ("all-reduce", "fsdp+context", 2 * 64 * 7 / 8, 1),
        ("collective-permute", "context", 64.0, 1),
        ("reduce-scatter", "context", 4 * 4 * 3.0, 5),
    ]


def test_bytes_add_up_by_axes() -> None:
    assert sent_by_axes(collectives(TEXT, MESH)) == {
        "fsdp": 64 * 5 + 20,
        "context": 48 * 5 + 64,
        "fsdp+context": 112,
    }


def test_a_text_without_a_program_is_refused() -> None:
    with pytest.raises(ValueError, match="entry"):
        collectives("HloModule nothing", MESH)
