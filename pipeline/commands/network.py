"""The options that say which network, and how images go into it."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.commands.completion import backbone_names

BackboneOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="A network of the table (`backbones` lists them), or a .keras file of your own.  [default: inception_v3]",
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
        help="How pixels go in: none, x/127.5-1, x/255, imagenet, bgr-means, or MEAN,STD in grey levels.  "
        "[default: that of the network in the table; of your own as before]",
    ),
]
