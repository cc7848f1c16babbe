"""The feature cache on disk: rows of features in HDF5 shards, and a SQLite index that finds them.

A shard is written once, named by its sha256, and never changed. The index can be derived again from the shards.
`space` has `FeatureSpace` and `Cache`, the folder of all feature spaces. No module here imports TensorFlow.
"""
