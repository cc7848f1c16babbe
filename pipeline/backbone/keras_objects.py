"""Lists of the Keras objects that an architecture may contain, and checks against these lists.

All other objects of Keras are refused:

- layers that contain or load code (Lambda, TFSMLayer, TorchModuleWrapper, JaxLayer, FlaxLayer);
- layers that read files or text (StringLookup, TextVectorization);
- operations that call functions (Map, Scan, Cond);
- operations that create tensors of any size without an input of that size (Arange, Full, OneHot).
"""

from __future__ import annotations

import re
from typing import Any

from pipeline.core.errors import SpecError


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Classes of keras.layers, under the names that Keras saves, without aliases.
LAYERS = _names(
    """
    Activation ActivityRegularization AdaptiveAveragePooling1D AdaptiveAveragePooling2D AdaptiveAveragePooling3D
    AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D Add AdditiveAttention AlphaDropout Attention
    AutoContrast Average AveragePooling1D AveragePooling2D AveragePooling3D BatchNormalization Bidirectional CenterCrop
    Concatenate Conv1D Conv1DTranspose Conv2D Conv2DTranspose Conv3D Conv3DTranspose ConvLSTM1D ConvLSTM2D ConvLSTM3D
    Cropping1D Cropping2D Cropping3D Dense DepthwiseConv1D DepthwiseConv2D Dot Dropout ELU EinsumDense Embedding
    Equalization Flatten GRU GRUCell GaussianDropout GaussianNoise GlobalAveragePooling1D GlobalAveragePooling2D
    GlobalAveragePooling3D GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D GroupNormalization
    Identity InputLayer LSTM LSTMCell LayerNormalization LeakyReLU Masking MaxPooling1D MaxPooling2D
    MaxPooling3D Maximum Minimum MultiHeadAttention Multiply Normalization PReLU Permute RMSNormalization RNN
    RandomBrightness RandomColorDegeneration RandomColorJitter RandomContrast RandomCrop RandomElasticTransform
    RandomErasing RandomFlip RandomGaussianBlur RandomGrayscale RandomHue RandomInvert RandomPerspective
    RandomPosterization RandomRotation RandomSaturation RandomSharpness RandomShear RandomTranslation RandomZoom ReLU
    RepeatVector Rescaling Reshape Resizing SeparableConv1D SeparableConv2D SimpleRNN SimpleRNNCell Softmax Solarization
    SpatialDropout1D SpatialDropout2D SpatialDropout3D StackedRNNCells Subtract TimeDistributed
    UnitNormalization UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D ZeroPadding3D
    """
)

# Module → layers that keras.applications defines for its own networks.
APPLICATION_LAYERS = {
    "keras.src.applications.convnext": frozenset({"LayerScale", "StochasticDepth"}),
    "keras.src.applications.inception_resnet_v2": frozenset({"CustomScaleLayer"}),
}

# Module → bare operations on tensors, such as those of `x * 2` and `keras.ops.mean(x)` in a graph.
OPERATIONS = {
    "keras.src.ops.core": _names("Cast SaturateCast Slice StopGradient Unstack"),
    "keras.src.ops.numpy": _names(
        """
        Abs Absolute Add All Amax Amin Any Arctan Arctan2 Argmax Argmin Average BroadcastTo Ceil Clip Concatenate Copy
        Cos Cosh Cumsum Divide DivideNoNan Dot Einsum Equal Exp Exp2 ExpandDims Expm1 Flip Floor FloorDivide GetItem
        Greater GreaterEqual Log Log10 Log1p Log2 Logaddexp LogicalAnd LogicalNot LogicalOr LogicalXor Less LessEqual
        Matmul Max Maximum Mean Median Min Minimum Mod Moveaxis Multiply NanToNum Negative NotEqual OnesLike Pad Power
        Prod Ravel Reciprocal Repeat Reshape Roll Rot90 Round Sign Sin Sinh Split Sqrt Square Squeeze Stack Std Subtract
        Sum Swapaxes Take TakeAlongAxis Tan Tanh Tensordot Tile Transpose TrueDivide Trunc Var Where ZerosLike
        """
    ),
    "keras.src.ops.nn": _names(
        """
        AdaptiveAveragePool AdaptiveMaxPool AveragePool BatchNorm Celu Conv ConvTranspose DepthToSpace DepthwiseConv
        DotProductAttention Elu Gelu Glu HardShrink HardSigmoid HardSilu HardTanh LayerNorm LeakyRelu LogSigmoid
        LogSoftmax MaxPool Moments Normalize RMSNorm Relu Relu6 Selu SeparableConv Sigmoid Silu SoftShrink Softmax
        Softplus Softsign SpaceToDepth SparsePlus SparseSigmoid Sparsemax Squareplus TanhShrink Threshold
        """
    ),
    "keras.src.ops.image": _names(
        "CropImages ExtractPatches GaussianBlur HSVToRGB PadImages RGBToGrayscale RGBToHSV Resize"
    ),
    "keras.src.ops.math": _names("Erf Logsumexp Rsqrt"),
    "keras.src.ops.linalg": frozenset({"Norm"}),
}

# Functions of keras.activations, under the names that Keras saves.
ACTIVATIONS = _names(
    """
    celu elu exponential gelu glu hard_shrink hard_sigmoid hard_silu hard_swish hard_tanh leaky_relu linear log_sigmoid
    log_softmax mish relu relu6 selu sigmoid silu soft_shrink softmax softplus softsign sparse_plus sparse_sigmoid
    sparsemax squareplus swish tanh tanh_shrink threshold
    """
)

INITIALIZERS = _names(
    """
    Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity IdentityInitializer LecunNormal LecunUniform Ones
    Orthogonal OrthogonalInitializer RandomNormal RandomUniform TruncatedNormal VarianceScaling Zeros
    """
)
REGULARIZERS = _names("L1 L1L2 L2 OrthogonalRegularizer")
CONSTRAINTS = _names("MaxNorm MinMaxNorm NonNeg UnitNorm")
MODELS = _names("Functional Sequential Model")
POLICIES = _names("float32 float16 bfloat16 mixed_float16 mixed_bfloat16")

# Class → arguments that only later versions of Keras write, with the values that earlier versions imply.
# "" means every class.
LATER_DEFAULTS: dict[str, dict[str, Any]] = {
    "": {"quantization_config": None},
    "BatchNormalization": {"renorm": False, "renorm_clipping": None, "renorm_momentum": 0.99},
    "InputLayer": {"sparse": False, "ragged": False, "optional": False},
}

OWN_ONLY = "use layers of Keras alone, and save the model anew"
_CODE = {
    "Lambda": "which is code",
    "__lambda__": "which is code",
    "TFSMLayer": "which loads a SavedModel",
    "TorchModuleWrapper": "which is code of PyTorch",
    "JaxLayer": "which is code of JAX",
    "FlaxLayer": "which is code of JAX",
    "StringLookup": "which reads files",
    "IntegerLookup": "which reads files",
    "TextVectorization": "which reads files",
}


def module_of(value: dict[str, Any]) -> str:
    """Return the module that the JSON of an object names, or "" if there is none."""
    return value.get("module") or ""


def require_known(value: Any, kind: str) -> str:
    """Return the class name in the JSON of a model or a layer; `kind` is "model" or "layer".

    Raises SpecError if the class is not one of Keras' own that are allowed.
    """
    if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
        found = value.get("class_name") if isinstance(value, dict) else value
        _refuse(str(found), module_of(value) if isinstance(value, dict) else "")
    name, module = value["class_name"], module_of(value)
    registered = value.get("registered_name")
    if registered not in (None, name) or not _is_known(module, name, kind):
        _refuse(registered if isinstance(registered, str) and registered != name else str(name), module)
    return name


def _is_known(module: str, name: str, kind: str) -> bool:
    if name in MODELS and re.fullmatch(r"keras(\.models|\.src\.models\.\w+)?", module):
        return True
    if kind == "model":
        return False
    in_layers = re.fullmatch(r"keras\.layers|keras\.src\.layers(\.\w+)+", module) and name in LAYERS
    return bool(in_layers) or name in APPLICATION_LAYERS.get(module, ()) or name in OPERATIONS.get(module, ())


def _refuse(name: str, module: str) -> None:
    why = _CODE.get(name, "which is not one of Keras' own that are read")
    where = f" of {module!r:.60}" if module and not module.startswith("keras.") else ""
    raise SpecError(f"has {name!r:.60}{where}, {why}; {OWN_ONLY}")


def require_policy(policy: Any, name: str) -> None:
    """Raise SpecError unless the dtype policy of the layer `name` is plain or mixed floats of at most 32 bits."""
    if isinstance(policy, dict):
        if policy.get("class_name") not in ("DTypePolicy", "FloatDTypePolicy"):
            raise SpecError(
                f"has the dtype policy {policy.get('class_name')!r:.60} at {name!r:.60}; save it in float32"
            )
        policy = policy["config"]["name"]
    if policy is not None and policy not in POLICIES:
        raise SpecError(f"has the dtype policy {policy!r:.60} at {name!r:.60}; save it in float32")


def require_known_or_none(key: str, value: Any) -> None:
    """Raise SpecError if an initializer, regularizer or constraint is not one of Keras' own.

    `key` is the name of the layer's argument, `value` its JSON; other arguments are not checked.
    """
    known = {"_initializer": INITIALIZERS, "_regularizer": REGULARIZERS, "_constraint": CONSTRAINTS}
    for ending, names in known.items():
        if (
            key.endswith(ending)
            and isinstance(value, dict)
            and (
                value.get("class_name") not in names or value.get("registered_name") not in (None, value["class_name"])
            )
        ):
            _refuse(str(value.get("registered_name") or value.get("class_name")), module_of(value))
