"""The frozen network: the table of named networks, own networks, their weights, and the compiled function.

`source` finds the network and `weights` its weights, both without TensorFlow. `build` makes the Keras model, `graph`
cuts it after a layer, `fold_batch_norm` folds batch norms into convolutions, and `frozen` computes the features.
"""
