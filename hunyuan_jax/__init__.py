"""A JAX/Flax training stack for HunyuanVideo. The map, from the outside in:

train, generate, evaluate, report    commands
doctor                               command: what this machine lacks
export, convert                      commands: weights out of a run, and from any layout to any other
codec                                VAE and text tower as one folder, between the world and the DiT
tasks                                what is trained, by what loss, and how it is shown
flow, sampling                       flow matching and Euler steps
models                               VAE, DiT, text tower: pure functions of parameters
data                                 records, buckets, schedule, batches
parallel                             the mesh, where arrays live, attention over devices
attention_kernels                    attention in parts, by the reference or a TPU's kernels
train_step, optimizer, checkpoint    one step, and how a run continues
block_norms, goodput, profiling      what is watched meanwhile; held_out, spikes
weights, adapters, tensor_files      weights and LoRA adapters as they lie in files
metrics, video_io                    other files in and out
plan, estimate, hlo                  command: what a pod would hold and take, by its compiler and by arithmetic
flops                                what a model costs, and what a device can do
settings, errors                     the door from configs to dataclasses, and what a user can get wrong
"""
