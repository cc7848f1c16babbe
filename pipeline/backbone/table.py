"""The table of backbones, with one row for each network of keras.applications.

Builders, sizes, addresses and hashes are those of keras/src/applications in Keras 3.15. The scaling is that of the
application's own `preprocess_input`. Parameters, multiplications and row shapes were computed from the graph. For
MobileNet and MobileNetV2, Keras has different weights for some sizes (128, 160, 192); Icebox uses those for 224 at
every size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

from pipeline.backbone.scaling import BGR_MEANS, IMAGENET, NONE, TANH
from pipeline.core.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Backbone:
    """One network of keras.applications, with its input size, scaling, default layer and ImageNet weights."""

    name: str
    application: str  # the builder's name in keras.applications
    input_size: int
    scaling: str  # canonical; "none" if the network itself scales the pixels
    default_layer: str  # gives the last feature map, the output without top
    weights_url: str  # ImageNet's weights without top
    weights_file: str  # the name of that file in Keras' own folder
    weights_hash: str | None  # "md5:…" or "sha256:…" as published; None if Keras publishes no hash
    parameters: int  # without top
    multiplications: int  # with weights, for one image of `input_size`, without top
    row: tuple[int, int, int]  # (h, w, c) of the default layer for one image of `input_size`


_SERVER = "https://storage.googleapis.com/"
_KERAS = f"{_SERVER}tensorflow/keras-applications/"
_NO_TOP = "_weights_tf_dim_ordering_tf_kernels_notop.h5"


def _row(
    name: str,
    application: str,
    input_size: int,
    weights_hash: str | None,
    parameters: int,
    multiplications: int,
    channels: int,
    *,
    scaling: str,
    layer: str,
    address: str,
    file: str | None = None,
    side: int | None = None,
) -> Backbone:
    """Return a row of the table.

    `address` and `file` may contain {name}. `address` may also contain {variant}, the part of the name after its last
    "_", and {builder}, `application` in lower case. `side` is that of the feature map; by default it is a 32nd
    of the image's side, rounded up.
    """
    variant, builder = name.rpartition("_")[2], application.lower()
    url = address.format(name=name, variant=variant, builder=builder)
    file = file.format(name=name) if file else PurePosixPath(url).name
    side = side or -(-input_size // 32)
    counts = parameters, multiplications, (side, side, channels)
    return Backbone(name, application, input_size, scaling, layer, url, file, weights_hash, *counts)


# The values that the rows of a family have in common.
_inception = partial(_row, scaling=TANH, address=_KERAS + "{name}/{name}" + _NO_TOP)
_mobilenet = partial(_row, scaling=TANH)
_mobilenet_v3 = partial(
    _row, scaling=NONE, address=_KERAS + "mobilenet_v3/weights_mobilenet_v3_{variant}_224_1.0_float_no_top_v2.h5"
)
_resnet = partial(
    _row, scaling=BGR_MEANS, channels=2048, layer="conv5_block3_out", address=_KERAS + "resnet/{builder}" + _NO_TOP
)
_resnet_v2 = partial(
    _row, scaling=TANH, channels=2048, layer="post_relu", address=_KERAS + "resnet/{builder}" + _NO_TOP
)
_densenet = partial(_row, scaling=IMAGENET, layer="relu", address=_KERAS + "densenet/{name}" + _NO_TOP)
_vgg = partial(_row, scaling=BGR_MEANS, channels=512, layer="block5_pool", address=_KERAS + "{name}/{name}" + _NO_TOP)
_nasnet = partial(_row, scaling=TANH, address=_KERAS + "nasnet/NASNet-{variant}-no-top.h5", file="{name}_no_top.h5")
_efficientnet = partial(
    _row, scaling=NONE, layer="top_activation", address=_SERVER + "keras-applications/{builder}_notop.h5"
)
_efficientnet_v2 = partial(
    _row, scaling=NONE, layer="top_activation", address=_KERAS + "efficientnet_v2/efficientnetv2-{variant}_notop.h5"
)
_convnext = partial(_row, scaling=NONE, layer="layer_normalization", address=_KERAS + "convnext/{name}_notop.h5")

_ROWS = (
    _inception(
        "inception_v3",
        "InceptionV3",
        299,
        "md5:bcbd6486424b2319ff4ef7d526e38f63",
        21_802_784,
        5_711_168_096,
        2048,
        layer="mixed10",
        side=8,
    ),
    _inception(
        "inception_resnet_v2",
        "InceptionResNetV2",
        299,
        "md5:d19885ff4a710c122648d3b5c3b684e4",
        54_336_736,
        13_154_258_016,
        1536,
        layer="conv_7b_ac",
        side=8,
    ),
    _inception(
        "xception",
        "Xception",
        299,
        "md5:b0042744bf5b25fce3cb969f33bebb97",
        20_861_480,
        8_355_355_496,
        2048,
        layer="block14_sepconv2_act",
    ),
    _mobilenet(
        "mobilenet",
        "MobileNet",
        224,
        None,
        3_228_864,
        567_716_352,
        1024,
        layer="conv_pw_13_relu",
        address=_KERAS + "mobilenet/mobilenet_1_0_224_tf_no_top.h5",
    ),
    _mobilenet(
        "mobilenet_v2",
        "MobileNetV2",
        224,
        None,
        2_257_984,
        299_494_272,
        1280,
        layer="out_relu",
        address=_KERAS + "mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
    ),
    _mobilenet_v3(
        "mobilenet_v3_small",
        "MobileNetV3Small",
        224,
        "md5:d3e8ec802a04aa4fc771ee12a9a9b836",
        939_120,
        54_896_576,
        576,
        layer="activation_17",
    ),
    _mobilenet_v3(
        "mobilenet_v3_large",
        "MobileNetV3Large",
        224,
        "md5:07fb09a5933dd0c8eaafa16978110389",
        2_996_352,
        214_080_960,
        960,
        layer="activation_19",
    ),
    _resnet("resnet50", "ResNet50", 224, "md5:4d473c1dd8becc155b73f8504c6f6626", 23_587_712, 3_855_925_248),
    _resnet("resnet101", "ResNet101", 224, "md5:88cf7a10940856eca736dc7b7e228a21", 42_658_176, 7_568_146_432),
    _resnet("resnet152", "ResNet152", 224, "md5:ee4c566cf9a93f14d82f913c2dc6dd0c", 58_370_944, 11_280_367_616),
    _resnet_v2("resnet50_v2", "ResNet50V2", 224, "md5:fac2f116257151a9d068a22e544a4917", 23_564_800, 3_480_207_360),
    _resnet_v2("resnet101_v2", "ResNet101V2", 224, "md5:c0ed64b8031c3730f411d2eb4eea35b5", 42_626_560, 7_192_428_544),
    _resnet_v2("resnet152_v2", "ResNet152V2", 224, "md5:ed17cf2e0169df9d443503ef94b23b33", 58_331_648, 10_904_649_728),
    _densenet(
        "densenet121", "DenseNet121", 224, "md5:30ee3e1110167f948a6b9946edeeb738", 7_037_504, 2_833_137_664, 1024
    ),
    _densenet(
        "densenet169", "DenseNet169", 224, "md5:b8c4d4c20dd625c148057b9ff1c1176b", 12_642_880, 3_358_179_328, 1664
    ),
    _densenet(
        "densenet201", "DenseNet201", 224, "md5:c13680b51ded0fb44dff2d8f86ac8bb1", 18_321_984, 4_289_445_888, 1920
    ),
    _vgg("vgg16", "VGG16", 224, "md5:6d6bbae143d832006294945121d1f1fc", 14_714_688, 15_346_630_656),
    _vgg("vgg19", "VGG19", 224, "md5:253f8cb515780f3b799900260a226db6", 20_024_384, 19_508_428_800),
    _nasnet(
        "nasnet_mobile",
        "NASNetMobile",
        224,
        "md5:1ed92395b5b598bdda52abe5c0dbfd63",
        4_269_716,
        562_582_816,
        1056,
        layer="activation_187",
    ),
    _nasnet(
        "nasnet_large",
        "NASNetLarge",
        331,
        "md5:d81d89dc07e6e56530c4e77faddd61b5",
        84_916_818,
        23_779_382_658,
        4032,
        layer="activation_259",
    ),
    _efficientnet(
        "efficientnet_b0", "EfficientNetB0", 224, "md5:50bc09e76180e00e4465e1a485ddc09d", 4_049_571, 384_534_752, 1280
    ),
    _efficientnet(
        "efficientnet_b1", "EfficientNetB1", 240, "md5:74c4e6b3e1f6a1eea24c589628592432", 6_575_239, 685_522_832, 1280
    ),
    _efficientnet(
        "efficientnet_b2", "EfficientNetB2", 260, "md5:111f8e2ac8aa800a7a99e3239f7bfb39", 7_768_569, 992_153_872, 1408
    ),
    _efficientnet(
        "efficientnet_b3",
        "EfficientNetB3",
        300,
        "md5:af6d107764bb5b1abb91932881670226",
        10_783_535,
        1_825_605_392,
        1536,
    ),
    _efficientnet(
        "efficientnet_b4",
        "EfficientNetB4",
        380,
        "md5:ebc24e6d6c33eaebbd558eafbeedf1ba",
        17_673_823,
        4_391_979_024,
        1792,
    ),
    _efficientnet(
        "efficientnet_b5",
        "EfficientNetB5",
        456,
        "md5:38879255a25d3c92d5e44e04ae6cec6f",
        28_513_527,
        10_264_336_752,
        2048,
    ),
    _efficientnet(
        "efficientnet_b6",
        "EfficientNetB6",
        528,
        "md5:9ecce42647a20130c1f39a5d4cb75743",
        40_960_143,
        19_065_289_536,
        2304,
    ),
    _efficientnet(
        "efficientnet_b7",
        "EfficientNetB7",
        600,
        "md5:cbcfe4450ddf6f3ad90b1b398090fe4a",
        64_097_687,
        37_743_324_192,
        2560,
    ),
    _efficientnet_v2(
        "efficientnet_v2_b0",
        "EfficientNetV2B0",
        224,
        "md5:893217f2bb855e2983157299931e43ff",
        5_919_312,
        716_806_176,
        1280,
    ),
    _efficientnet_v2(
        "efficientnet_v2_b1",
        "EfficientNetV2B1",
        240,
        "md5:0e80663031ca32d657f9caa404b6ec37",
        6_931_124,
        1_195_539_360,
        1280,
    ),
    _efficientnet_v2(
        "efficientnet_v2_b2",
        "EfficientNetV2B2",
        260,
        "md5:1dfe2e7a5d45b6632553a8961ea609eb",
        8_769_374,
        1_696_134_832,
        1408,
    ),
    _efficientnet_v2(
        "efficientnet_v2_b3",
        "EfficientNetV2B3",
        300,
        "md5:f6abf7b5849ac99a89b50dd3fd532856",
        12_930_622,
        3_009_922_816,
        1536,
    ),
    _efficientnet_v2(
        "efficientnet_v2_s",
        "EfficientNetV2S",
        384,
        "md5:af0682fb74e8c54910f2d4393339c070",
        20_331_360,
        8_364_337_152,
        1280,
    ),
    _efficientnet_v2(
        "efficientnet_v2_m",
        "EfficientNetV2M",
        480,
        "md5:1b8dc055df72dde80d614482840fe342",
        53_150_388,
        24_581_180_384,
        1280,
    ),
    _efficientnet_v2(
        "efficientnet_v2_l",
        "EfficientNetV2L",
        480,
        "md5:b0b66b5c863aef5b46e8608fe1711615",
        117_746_848,
        56_078_419_008,
        1280,
    ),
    _convnext(
        "convnext_tiny",
        "ConvNeXtTiny",
        224,
        "sha256:d547c096cabd03329d7be5562c5e14798aa39ed24b474157cef5e85ab9e49ef1",
        27_820_128,
        4_454_763_264,
        768,
    ),
    _convnext(
        "convnext_small",
        "ConvNeXtSmall",
        224,
        "sha256:6fc8009faa2f00c1c1dfce59feea9b0745eb260a7dd11bee65c8e20843da6eab",
        49_454_688,
        8_682_944_256,
        768,
    ),
    _convnext(
        "convnext_base",
        "ConvNeXtBase",
        224,
        "sha256:40a20c5548a5e9202f69735ecc06c990e6b7c9d2de39f0361e27baeb24cb7c45",
        87_566_464,
        15_353_705_472,
        1024,
    ),
    _convnext(
        "convnext_large",
        "ConvNeXtLarge",
        224,
        "sha256:96f02b6f0753d4f543261bc9d09bed650f24dd6bc02ddde3066135b63d23a1cd",
        196_230_336,
        34_359_897_600,
        1536,
    ),
    _convnext(
        "convnext_xlarge",
        "ConvNeXtXLarge",
        224,
        "sha256:de3f8a54174130e0cecdc71583354753d557fcf1f4487331558e2a16ba0cfe05",
        348_147_968,
        60_918_982_656,
        2048,
    ),
)
BACKBONES: dict[str, Backbone] = {row.name: row for row in _ROWS}
DEFAULT_BACKBONE = "inception_v3"


def find_backbone(name: str) -> Backbone:
    """Return the row called `name`. Raises UsageError if there is none; the message names a similar one."""
    if name not in BACKBONES:
        near = did_you_mean(name, BACKBONES)
        raise UsageError(f"no backbone {name!r:.60} (`backbones` lists them, your own is a .keras file){near}")
    return BACKBONES[name]
