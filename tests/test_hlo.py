"""Laws of what is read from a compiled program: loops count as often as they run, and an exchange goes over the axes it goes over."""

import pytest

from hunyuan_jax.hlo import Program, _axes, _bytes, _group
from tests.commands import run_program

LOOP = """
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import PartitionSpec as P
from hunyuan_jax.hlo import Program
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh

mesh = make_mesh(MeshConfig(data=2, fsdp=1, sequence=4, tensor=1))

def f(x):
    def hop(x, _):
        inner, _ = jax.lax.scan(lambda y, _: (jax.lax.ppermute(y, "sequence", [(i, (i + 1) % 4) for i in range(4)]) + 1, None), x, length=3)
        return inner, jax.lax.psum(inner[:1], "data")
    x, sums = jax.lax.scan(hop, x, length=5)
    return x, jax.lax.psum(sums, ("data", "sequence"))

with jax.set_mesh(mesh):
    run = jax.jit(jax.shard_map(f, in_specs=P("sequence"), out_specs=(P("sequence"), P()), check_vma=False))
    program = Program(run.lower(jax.ShapeDtypeStruct((64, 8), jnp.float32)).compile().as_text())
for e in sorted(program.exchanges(mesh.shape), key=lambda e: (e.kind, e.axes)):
    print(e.kind, "+".join(e.axes), e.times, e.sent)
"""


def test_exchanges_count_as_often_as_loops_run_with_bytes_and_axes():
    """16 x 8 floats are passed on 15 times; 8 floats are summed over two devices 5 times, and 5 x 8 over all: twice 7/8 of them."""
    said = run_program(LOOP).splitlines()
    assert said == ["all-reduce data 5 32.0", "all-reduce data+sequence 1 280.0", "collective-permute sequence 15 512"]


MESH = {"data": 2, "fsdp": 4, "sequence": 2, "tensor": 1}


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}, x", ("fsdp",)),
        ("replica_groups=[8,2]<=[16], dimensions={0}", ("sequence",)),
        ("replica_groups=[8,2]<=[2,8]T(1,0), dimensions={0}", ("data",)),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_1'}, dimensions={0}", ("sequence",)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1'}, x", ("data", "fsdp", "sequence")),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=2], device_ids=([2,8]T(1,0)) {'axis_2'}, x", ("data",)),
        ("source_target_pairs={{0,1},{1,0}}, x", ("sequence",)),
        ("replica_groups={}, x", ("data", "fsdp", "sequence")),
    ],
)
def test_groups_in_every_notation_lie_along_their_axes(groups, axes):
    assert _axes(_group(groups, 16), MESH) == axes


def test_a_notation_or_a_type_that_is_not_known_is_an_error():
    assert (_bytes("f32"), _bytes("bf16"), _bytes("s4"), _bytes("f8e4m3fn")) == (4, 2, 0.5, 1)
    with pytest.raises(ValueError, match="'opaque'"):
        _bytes("opaque")
    with pytest.raises(ValueError, match="cannot be read: replica_groups=some"):
        _group("replica_groups=some, dimensions={0}", 16)


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ("(bf16[8]{0}, bf16[4]{0}) all-reduce-start(%a, %b), replica_groups={{0,1},{2,3}}", 2 * 24 / 2),
        ("bf16[8]{0} all-reduce-start(%a), replica_groups={{0,1},{2,3}}", 2 * 16 / 2),
        ("(bf16[8]{0}, bf16[16]{0}) all-gather-start(%a), replica_groups={{0,1},{2,3}}", 32 / 2),
        ("((bf16[8]{0}, bf16[2]{0}), (bf16[16]{0}, bf16[4]{0})) all-gather-start(%a, %b), replica_groups={{0,1},{2,3}}", 40 / 2),
        ("bf16[4]{0} reduce-scatter(%a), replica_groups={{0,1},{2,3}}", 8),
        ("bf16[16]{0} all-to-all(%a), replica_groups={}", 32 * 3 / 4),
        ("bf16[16]{0} all-reduce(%a), replica_groups={{0},{1},{2},{3}}", None),
    ],
)
def test_an_exchange_sends_what_its_results_say(line, sent):
    """Around a ring: an all-reduce sends its results twice, but for the device's own share; what none is part of is no exchange."""
    program = Program(f"ENTRY %main (a: bf16[8]) -> bf16[8] {{\n  ROOT %it = {line}\n}}")
    assert [exchange.sent for exchange in program.exchanges({"data": 2, "fsdp": 2})] == ([] if sent is None else [sent])


SCHEDULED = """
%body (p: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %p = (s32[], bf16[2,4]{1,0}) parameter(0)
  %splash_fwd.3 = (f32[8,128]{1,0}, bf16[2,4]{1,0}) custom-call(%p), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], bf16[2,4]{1,0}) tuple(%p)
}

%condition (p.1: (s32[], bf16[2,4])) -> pred[] {
  %c = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

ENTRY %main (a: bf16[2,4]) -> bf16[2,4] {
  %a = bf16[2,4]{1,0} parameter(0)
  %splash_fwd.1 = (f32[8,128]{1,0}, bf16[2,4]{1,0}) custom-call(%a), custom_call_target="tpu_custom_call"
  %while.1 = (s32[], bf16[2,4]{1,0}) while(%t0), condition=%condition, body=%body
  ROOT %r = bf16[2,4]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_kernels_are_counted_through_a_loop_whose_bound_stands_in_its_condition():
    assert Program(SCHEDULED).kernels() == {"splash_fwd": 8}
