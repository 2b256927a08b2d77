"""Token sequences: contexts, queries, batches, and the store of teacher targets."""
