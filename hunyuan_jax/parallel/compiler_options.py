"""What XLA is asked for on each generation of accelerators, as options of one compilation: `jax.jit(step, compiler_options=...)`.

Unlike flags in the environment, options stand in the repository, hold for one program, and are checked by the compiler one by one.

The sets are those that others train with: v5p and Ironwood (tpu7x) are from the Wan 2.1 recipes of AI-Hypercomputer/tpu-recipes, v6e from
MaxDiffusion's for Wan, v5e and v4 from MaxText, and GPUs follow NVIDIA's JAX-Toolbox. Left out is what tunes kernels that are not ours,
what jax's compilers of 0.10 and of 0.11 do not both know, and on all but v5e the fusion of all-gathers with what computes beside them
(`..._fuse_all_gather`), which newer compilers refuse there. The sets are not interchangeable: with Ironwood's, collectives on v5p hang.
"""

from typing import Literal

Generation = Literal["v4", "v5e", "v5p", "v6e", "tpu7x", "gpu"]

# What a device's kind begins with; the first that fits counts.
DEVICE_KINDS: tuple[tuple[str, Generation], ...] = (
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5e", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v6", "v6e"),
    ("TPU7x", "tpu7x"),
    ("NVIDIA", "gpu"),
    ("Tesla", "gpu"),
)

# Parameters split over `fsdp` are gathered for the next layer while this one is computed.
_OVERLAPPED_ALL_GATHER = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}

# Ironwood's compiler (libtpu 0.0.42) aborts over some of the sums that it gives to SparseCores, as it does unless told otherwise. With all
# of its vector memory to work with, the temporaries of a ring of 30,720 tokens to a device stay within 5 GiB. And as many permutes may be
# on their way at once as take the place of an all-to-all there, one to each of the others that share heads.
IRONWOOD = {
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "false",
    "xla_tpu_scoped_vmem_limit_kib": "65536",
    "xla_max_concurrent_async_collective_permutes": "32",
}

OPTIONS: dict[Generation, dict[str, str]] = {
    "v4": _OVERLAPPED_ALL_GATHER,
    "v5e": {**_OVERLAPPED_ALL_GATHER, "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true"},
    "v5p": {
        "xla_tpu_scoped_vmem_limit_kib": "65472",
        "xla_enable_async_all_gather": "true",
        "xla_enable_async_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_all_to_all": "true",
        "xla_max_concurrent_async_all_gathers": "4",
        "xla_latency_hiding_scheduler_rerun": "5",
    },
    "v6e": {
        **_OVERLAPPED_ALL_GATHER,
        "xla_tpu_scoped_vmem_limit_kib": "65536",
        "xla_enable_async_collective_permute": "true",
        "xla_tpu_enable_async_all_to_all": "true",
        "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
        "xla_tpu_data_parallel_opt_different_sized_ops": "true",
        "xla_tpu_enable_ag_backward_pipelining": "true",
        "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
        "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
        "xla_tpu_assign_all_reduce_scatter_layout": "true",
        "xla_latency_hiding_scheduler_rerun": "2",
    },
    "tpu7x": {
        **IRONWOOD,
        "xla_enable_async_all_gather": "true",
        "xla_enable_async_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_all_to_all": "true",
        "xla_tpu_prefer_async_allgather_to_allreduce": "true",
        "xla_max_concurrent_async_all_gathers": "4",
        "xla_latency_hiding_scheduler_rerun": "5",
        # Collectives run on the SparseCores, beside the matrix units.
        "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
        "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
        "xla_tpu_enable_sparse_core_reduce_scatter_v2": "true",
        "xla_tpu_enable_all_gather_offload_tracing": "true",
        "xla_tpu_use_tc_device_shape_on_sc": "true",
    },
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": "True",
        "xla_gpu_enable_while_loop_double_buffering": "True",
        "xla_gpu_all_gather_combine_threshold_bytes": "1073741824",
        "xla_gpu_reduce_scatter_combine_threshold_bytes": "1073741824",
        "xla_gpu_all_reduce_combine_threshold_bytes": "1073741824",
    },
}


# Without these a TPU's scheduler starts what a ring passes on, and what is exchanged for heads, only after the kernels that it could have
# run beside.
OVERLAPPED = {"xla_tpu_enable_all_experimental_scheduler_features": "true", "xla_tpu_enable_async_all_to_all": "true"}


def step_options(device_kind: str, *, tuned: bool) -> dict[str, str]:
    """What a training step is compiled with; where `tuned`, with all of the generation's options, which takes longer to compile."""
    always = OVERLAPPED if device_kind.startswith("TPU") else {}
    of_generation = IRONWOOD if generation_of(device_kind) == "tpu7x" else {}
    return always | (compiler_options(device_kind) if tuned else of_generation)


def generation_of(device_kind: str) -> Generation | None:
    """The generation of devices of a kind, None for CPUs and for kinds that are not known."""
    return next((found for beginning, found in DEVICE_KINDS if device_kind.startswith(beginning)), None)


def compiler_options(device_kind: str) -> dict[str, str]:
    """The options for devices of a kind, which is `device_kind` of a `jax.Device`; none for CPUs and for kinds that are not known."""
    generation = generation_of(device_kind)
    return dict(OPTIONS[generation]) if generation else {}
