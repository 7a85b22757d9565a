"""Scripts that start runs: on this machine, on a cluster, in a cloud."""
