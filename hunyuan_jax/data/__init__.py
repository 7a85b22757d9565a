"""Records on disk, the plan of what each step reads, and batches on the mesh."""
