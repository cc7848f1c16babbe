"""`predict` on many files beside `features` on the same: images/s and the peak of resident memory, at two sizes.

    python benchmarks/predict.py --data-dir DATA RUN --images FOLDER --count 20000

Makes `--count` files from the images of FOLDER, each with a few bytes of its own behind the picture, so that no two are
the same image; predicts all of them, and the first tenth, without a cached row among them; then computes features of
the first tenth. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--weights")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, tenth = Path(folder), options.count // 10
        make_files(Path(options.images), root / "all" / "x", options.count)
        first = root / "first" / "x"
        first.mkdir(parents=True)
        for path in sorted((root / "all" / "x").iterdir())[:tenth]:
            os.link(path, first / path.name)
        data = root / "data"  # the run, and no rows
        shutil.copytree(Path(options.data_dir) / "runs" / options.run, data / "runs" / options.run)
        more = ["--weights", options.weights] if options.weights else []
        found = {
            "features of the first tenth": measured(data, "features", "--dataset", root / "first", *more),
            "predict the first tenth": measured(root / "other", "predict", data / "runs" / options.run, first, *more),
            "predict all": measured(root / "other", "predict", data / "runs" / options.run, root / "all", *more),
        }
    print(json.dumps({"run": options.run, "count": options.count, **found}, indent=1))


def make_files(source: Path, target: Path, count: int) -> None:
    contents = [path.read_bytes() for path in sorted(source.rglob("*")) if path.suffix in (".jpg", ".png")]
    target.mkdir(parents=True)
    for i in range(count):
        (target / f"{i:06}.jpg").write_bytes(contents[i % len(contents)] + i.to_bytes(8, "big"))


def measured(data: Path, *arguments: str | Path) -> dict[str, Any]:
    line = [sys.executable, str(ROOT / "cli.py"), "--data-dir", str(data), *map(str, arguments), "--json"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    said = json.loads(process.stdout.read())
    _, code, usage = os.wait4(process.pid, 0)
    assert code == 0, said
    seconds = said["seconds"]
    images = said["images"]
    return {"images": images, "seconds": seconds, "images_per_second": round(images / seconds, 1),
            "of_the_model": said.get("images_per_second"), "peak_gb": round(usage.ru_maxrss / 1e6, 3)}  # fmt: skip


if __name__ == "__main__":
    main()
