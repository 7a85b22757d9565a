"""One layer's attention over devices, forward and backward, as the compilers of TPUs that are not attached make it: what it holds beside
arguments and results, and which exchanges no kernel runs beside.

    python -m tests.bench.overlap [--cases v5p:2x2x1/4/1 ...]      a topology, its devices along `sequence`, how many share heads

24 heads of 128 in bfloat16, 30,720 image tokens on each device and 256 of text. Permutes go around a ring, and on Ironwood take the place
of all-to-alls too. Of the exchanges that wait, the table says how many kernels, or loops of them, come before them in their computation.
"""

import argparse
import re
from typing import NamedTuple

from hunyuan_jax.hlo import Program
from tests.commands import run_program

CASES = (
    "v5p:2x2x1/4/1", "v5p:2x2x2/8/1", "v5p:2x2x1/4/4", "v5p:2x2x2/8/8", "v5p:2x2x1/4/2", "v5p:2x2x2/8/2", "v5p:2x2x4/16/8",
    "v6e:2x2/4/1", "v6e:2x4/8/1", "v6e:2x2/4/4", "v6e:2x4/8/8", "v6e:2x4/8/2", "v6e:4x4/16/8",
    "tpu7x:2x2x1/4/1", "tpu7x:2x2x1/4/4", "tpu7x:2x2x2/8/8", "tpu7x:2x2x2/8/2", "tpu7x:2x2x2/16/8",
)  # fmt: skip
EXCHANGES = ("collective-permute", "all-to-all")
GIB = 2**30

BEGIN = """
import os
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
from jax.experimental import topologies
"""
LAYER = f"""{BEGIN}
from jax.sharding import NamedSharding
from hunyuan_jax.parallel.compiler_options import step_options
from hunyuan_jax.parallel.context_attention import IMAGE, SAMPLES, TEXT, How, context_attention
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh

mesh = make_mesh(MeshConfig(sequence=DEVICES), topologies.get_topology_desc("TOPOLOGY", platform="tpu").devices)
samples, length, degree = mesh.shape["data"], DEVICES * LOCAL, DEGREE

def array(spec, *shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

x = [array(IMAGE, samples, length, 24, 128)] * 3 + [array(TEXT, samples, 256, 24, 128)] * 3

def score(lengths, *x):
    return sum(jnp.sum(out.astype(jnp.float32)) for out in context_attention(x[:3], x[3:], txt_lengths=lengths, how=How(length, degree)))

with jax.set_mesh(mesh):
    step = jax.jit(jax.grad(score, argnums=range(1, 7))).lower(array(SAMPLES, samples, dtype=jnp.int32), *x)
    step = step.compile(step_options(mesh.devices.flat[0].device_kind, tuned=False))
print(step.memory_analysis().temp_size_in_bytes)
print(step.as_text())
"""


class Exchanged(NamedTuple):
    """Exchanges of a kind: how many there are, and of those beside which no kernel runs, how many kernels come before."""

    count: int
    alone: list[int]


def compile_layer(topology: str, devices: int, degree: int, *, local: int = 30_720) -> tuple[int, Program]:
    """Bytes of temporaries on a device, and the scheduled program, of a layer with so many image tokens on each."""
    source = LAYER
    for name, value in {"TOPOLOGY": topology, "DEVICES": devices, "DEGREE": degree, "LOCAL": local}.items():
        source = source.replace(name, str(value))
    temporaries, _, text = run_program(source).partition("\n")
    return int(temporaries), Program(text[text.index("HloModule") :])


def exchanged(program: Program, kind: str) -> Exchanged:
    count, alone = 0, []
    for instructions in program.computations.values():
        kernels, begun = 0, {}
        for instruction in instructions:
            kernels += program.holds_kernel(instruction)
            if instruction.operation == f"{kind}-start":
                begun[instruction.name] = kernels
            elif instruction.operation in (kind, f"{kind}-done"):
                count += 1
                start = begun.get(re.findall(r"%([\w.\-]+)", instruction.rest)[0], kernels)
                alone += [kernels] if start == kernels else []
    return Exchanged(count, alone)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.overlap", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=CASES)
    print("| topology | devices | share heads | temporaries | permutes, that wait | all-to-alls, that wait |")
    print("|---|---|---|---|---|---|")
    for case in parser.parse_args().cases:
        topology, devices, degree = case.split("/")
        temporaries, program = compile_layer(topology, int(devices), int(degree))
        columns = []
        for kind in EXCHANGES:
            count, alone = exchanged(program, kind)
            columns.append(f"{count}, {len(alone)}" + (f" (after {', '.join(map(str, alone))})" if alone else "") if count else "none")
        print(f"| {topology} | {devices} | {degree} | {temporaries / GIB:.2f} GiB | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
