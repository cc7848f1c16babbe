"""What this machine has, and what is wrong with a dataset, before anything is computed."""
