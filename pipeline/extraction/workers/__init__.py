"""Run shard tasks on Dask workers: connect to workers, check and watch them, and repeat the tasks of lost ones."""
