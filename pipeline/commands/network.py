"""The options that choose the network, its input size and its scaling."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.commands.completion import backbone_names

BackboneOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="The network: a name that `backbones` lists, or a .keras file of your own.  [default: inception_v3]",
        autocompletion=backbone_names,
    ),
]
InputSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Pixels a side that the network is given.  [default: the network's own]", min=1, max=4096
    ),
]
ScalingOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="How pixels are scaled: none, x/127.5-1, x/255, imagenet, bgr-means, or MEAN,STD in grey levels.  "
        "[default: the named network's own; of your own file, that of its features and runs on disk]",
    ),
]
