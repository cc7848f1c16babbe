"""Check this machine, or a dataset, before anything is computed: the implementation of `doctor`."""
