"""Store runs: the training request and the results, in a folder for each run.

`request` defines training requests, which are stored before training begins. `store` publishes a run's folder by one
rename and finds runs by name. `metrics` computes metrics of predictions, and `plots` draws them.
"""
