"""Shard tasks on Dask workers: connecting, checking, watching and replacing them."""
