"""The table of backbones: what goes with each network, so that adding one is adding a row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Backbone:
    """What goes with one network: preprocessing belongs to the model, so size and scaling stand here."""

    name: str
    application: str  # the builder's name in keras.applications
    input_size: int
    scaling: str
    default_layer: str
    weights_url: str
    weights_file: str
    weights_md5: str


# Weights: Keras' own file, its address and MD5 as in keras/src/applications/inception_v3.py.
# Scaling: keras.applications.inception_v3.preprocess_input.
_INCEPTION_V3 = Backbone(
    name="inception_v3",
    application="InceptionV3",
    input_size=299,
    scaling="x/127.5-1",
    default_layer="mixed10",
    weights_url="https://storage.googleapis.com/tensorflow/keras-applications/inception_v3/"
    "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
    weights_file="inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
    weights_md5="bcbd6486424b2319ff4ef7d526e38f63",
)
BACKBONES = {_INCEPTION_V3.name: _INCEPTION_V3}
DEFAULT_BACKBONE = _INCEPTION_V3.name
