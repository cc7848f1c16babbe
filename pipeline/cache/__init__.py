"""Features on disk: shards of rows in HDF5, and the SQLite index that finds them.

A shard is written once, named by its hash, and never changed; the index is derived from the shards. `space` is one
feature space and the cache of all of them. Nothing here imports TensorFlow.
"""
