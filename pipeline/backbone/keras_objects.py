"""Which of Keras' own objects an architecture may name: data only.

These are lists of what is allowed. Whatever else Keras has is refused: layers that hold code or load it (Lambda,
TFSMLayer, TorchModuleWrapper, JaxLayer, FlaxLayer), layers that read files or text (StringLookup, TextVectorization),
and operations that call functions (Map, Scan, Cond) or make tensors of any size out of nothing (Arange, Full, OneHot).
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# keras.layers, by the names that Keras saves, without aliases.
LAYERS = _names(
    """
    Activation ActivityRegularization AdaptiveAveragePooling1D AdaptiveAveragePooling2D AdaptiveAveragePooling3D
    AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D Add AdditiveAttention AlphaDropout Attention
    AutoContrast Average AveragePooling1D AveragePooling2D AveragePooling3D BatchNormalization Bidirectional CenterCrop
    Concatenate Conv1D Conv1DTranspose Conv2D Conv2DTranspose Conv3D Conv3DTranspose ConvLSTM1D ConvLSTM2D ConvLSTM3D
    Cropping1D Cropping2D Cropping3D Dense DepthwiseConv1D DepthwiseConv2D Dot Dropout ELU EinsumDense Embedding
    Equalization Flatten GRU GRUCell GaussianDropout GaussianNoise GlobalAveragePooling1D GlobalAveragePooling2D
    GlobalAveragePooling3D GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D GroupNormalization
    GroupQueryAttention Identity InputLayer LSTM LSTMCell LayerNormalization LeakyReLU Masking MaxPooling1D MaxPooling2D
    MaxPooling3D Maximum Minimum MultiHeadAttention Multiply Normalization PReLU Permute RMSNormalization RNN
    RandomBrightness RandomColorDegeneration RandomColorJitter RandomContrast RandomCrop RandomElasticTransform
    RandomErasing RandomFlip RandomGaussianBlur RandomGrayscale RandomHue RandomInvert RandomPerspective
    RandomPosterization RandomRotation RandomSaturation RandomSharpness RandomShear RandomTranslation RandomZoom ReLU
    RepeatVector Rescaling Reshape Resizing SeparableConv1D SeparableConv2D SimpleRNN SimpleRNNCell Softmax Solarization
    SpatialDropout1D SpatialDropout2D SpatialDropout3D SpectralNormalization StackedRNNCells Subtract TimeDistributed
    UnitNormalization UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D ZeroPadding3D
    """
)

# Layers that keras.applications adds for networks of its own, by module.
APPLICATION_LAYERS = {
    "keras.src.applications.convnext": frozenset({"LayerScale", "StochasticDepth"}),
    "keras.src.applications.inception_resnet_v2": frozenset({"CustomScaleLayer"}),
}

# Bare operations on tensors, as `x * 2` and `keras.ops.mean(x)` leave them in a graph, by module.
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

# keras.activations, by the names that Keras saves.
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
POLICIES = _names("float32 float16 bfloat16 mixed_float16 mixed_bfloat16")

# What later versions of Keras write though it is how earlier ones compute: by class, "" for every one.
LATER_DEFAULTS = {
    "": {"quantization_config": None},
    "BatchNormalization": {"renorm": False, "renorm_clipping": None, "renorm_momentum": 0.99},
    "InputLayer": {"sparse": False, "ragged": False, "optional": False},
}
