"""The device mesh, where arrays live on it, and the processes that share it."""
