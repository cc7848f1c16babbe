"""Stage one: choose the feature space, find what is missing, compute it, publish it as shards.

`feature_choice` finds the space, `planning` what it lacks, `compute` cuts that into tasks of a shard each, and
`shard_task` runs one task, here or in a Dask worker (`workers/`). `extract` is the whole stage.
"""
