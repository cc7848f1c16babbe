"""Train heads (stage two) and full models on cached rows or images, and publish them as runs.

`train_head` trains a head on cached rows, `finetune` the full model on images or on cached rows, and `sweep/` tries
settings. All of them share `training_data`, `batches`, `loop` and `run_folder`.
"""
