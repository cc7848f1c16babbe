"""Stage two and the full model: rows or images in, a trained and published run out.

`train_head` trains a head on cached rows, `finetune` the full model on images or on cached rows, and `sweep/` tries
settings. All of them share `training_data`, `batches`, `loop` and `run_folder`.
"""
