"""The option that says how many bits images with 16 bits a channel hold, shared by what decodes."""

from __future__ import annotations

from typing import Annotated

import typer

DepthOption = Annotated[
    int | None,
    typer.Option(
        metavar="BITS",
        help="How many bits images with 16 bits a channel really hold, e.g. 12 of a camera.  [default: 16]",
        min=9,
        max=16,
    ),
]
