"""Stage one: choose the feature space, find the missing rows, compute them, and publish them as shards.

`feature_choice` finds the space, `planning` its missing rows, `compute` cuts these into tasks of a shard each, and
`shard_task` runs one task, here or in a Dask worker (`workers/`). `extract` does the whole stage.
"""
