"""Feature extraction with thingsvision, as its own documentation has it: every image's tensor into one .npy file.

    python -m venv ENV && ENV/bin/pip install thingsvision
    ENV/bin/python benchmarks/peers/thingsvision_features.py FOLDER --limit 500

The weights are random, as those of other libraries do not fit in; it takes as long. Prints one JSON object: the images
and the seconds from the first one read to the file written, the model having been loaded before.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from thingsvision import get_extractor  # type: ignore[import-not-found]
from thingsvision.utils.data import DataLoader, ImageDataset  # type: ignore[import-not-found]
from thingsvision.utils.storing import save_features  # type: ignore[import-not-found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=500)
    given = parser.parse_args()
    extractor = get_extractor(model_name="inception_v3", source="torchvision", device="cpu", pretrained=False)
    with tempfile.TemporaryDirectory() as temporary:
        root, out = Path(temporary) / "images", Path(temporary) / "out"
        files = sorted(path for path in given.folder.resolve().rglob("*") if path.is_file())
        chosen = files[:: max(1, len(files) // given.limit)][: given.limit]  # of all classes
        for i, path in enumerate(chosen):
            link = root / path.parent.name / f"{i}{path.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
        start = time.perf_counter()
        backend = extractor.get_backend()
        dataset = ImageDataset(
            root=str(root),
            out_path=str(out),
            backend=backend,
            transforms=extractor.get_transformations(resize_dim=299, crop_dim=299),
        )
        batches = DataLoader(dataset=dataset, batch_size=32, backend=backend)
        features = extractor.extract_features(batches=batches, module_name="Mixed_7c", flatten_acts=False)
        save_features(features, out_path=str(out), file_format="npy")
        seconds = time.perf_counter() - start
    shape = list(np.shape(features))
    versions = {name: version(name) for name in ("thingsvision", "torch", "torchvision")}
    print(json.dumps({"images": shape[0], "seconds": round(seconds, 2), "shape": shape, "versions": versions}))


if __name__ == "__main__":
    main()
