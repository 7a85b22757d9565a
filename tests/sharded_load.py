"""One of several processes that load weights onto a mesh over all of them; `test_convert.py` starts it.

python -m tests.sharded_load PATH PORT PROCESS PROCESSES

Prints, as JSON, the bytes that were read and the largest piece of them, after it compared its shards with the whole file.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from hunyuan_jax import convert
from hunyuan_jax.models.layouts import abstract_params
from hunyuan_jax.parallel.mesh import MeshConfig, make_mesh
from hunyuan_jax.parallel.sharding import param_shardings
from hunyuan_jax.stored_tensor import StoredTensor


def main(path: Path, port: int, process: int, processes: int) -> None:
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", num_processes=processes, process_id=process)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config, whole = convert.load(path)
    tree = traverse_util.unflatten_dict(abstract_params(config), sep="/")
    shardings = param_shardings(tree, mesh)

    read: list[int] = []
    original = StoredTensor._bytes
    StoredTensor._bytes = lambda self, offset, count: (read.append(count), original(self, offset, count))[1]  # type: ignore[method-assign]
    pieces = convert.load(path, shardings=traverse_util.flatten_dict(shardings, sep="/"))[1]

    def compare(expected: jax.Array, came: jax.Array, sharding: jax.sharding.Sharding) -> None:
        assert came.sharding.is_equivalent_to(sharding, came.ndim)
        for shard in came.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(expected)[shard.index])

    jax.tree.map(compare, whole, pieces, shardings)
    print(json.dumps({"bytes": sum(read), "largest": max(read)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:]))
