"""The options by which a benchmark is told which network to measure, and how it tells the program."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_network_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", help="a weights file, of InceptionV3 or of --backbone")
    parser.add_argument("--backbone", help="another network: its name, or a .keras file, which brings its weights")
    parser.add_argument("--scaling", help="how pixels go into a network of your own")


def network_options(given: argparse.Namespace) -> list[str]:
    """Return the options of `cli.py` for the network that was named. Exits if none was."""
    if not given.weights and not given.backbone:
        raise SystemExit("error: say which network: --weights FILE, or --backbone FILE --scaling SCALING")
    backbone = given.backbone
    if backbone and Path(backbone).exists():
        backbone = str(Path(backbone).resolve())
    named = {"--weights": given.weights, "--backbone": backbone, "--scaling": given.scaling}
    return [text for option, value in named.items() if value for text in (option, value)]
