"""Use published runs: predict, evaluate, export and serve, and build the commands that reproduce a run."""
