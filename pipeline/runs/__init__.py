"""What a training was asked for, and what came out: a folder for each run.

`request` is stored before training begins; `store` publishes the folder whole and finds runs by name; `metrics` and
`plots` measure and draw predictions.
"""
