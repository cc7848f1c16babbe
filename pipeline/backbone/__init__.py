"""The frozen network: the table of named networks, networks of one's own, their weights, and the compiled function.

`source` settles which network is meant, `weights` which weights, both without TensorFlow; `build` makes the Keras
model, `graph` cuts it after a layer, `fold_batch_norm` folds batch norms, and `frozen` turns pixels into features.
"""
