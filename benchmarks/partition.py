"""Three machines on one: a scheduler with the program, and two workers, each in a network of its own; one is cut off.

    python benchmarks/partition.py --dataset FOLDER --weights FILE --cut-after 40

Three network namespaces with addresses of their own, joined by a bridge; the files are shared, as by a network file
system. `--cut-after` seconds after the first row the second worker's cable is pulled, and stays so. Needs root and
iproute2. Prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import features, parser_of, rows, running, scheduler_line, worker_line

HOSTS = {"icebox-a": "10.99.7.1", "icebox-b": "10.99.7.2", "icebox-c": "10.99.7.3"}
ADDRESS = "tcp://10.99.7.1:8791"
BRIDGE = "icebox-br"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--cut-after", type=float, default=40.0)
    options = parser.parse_args()
    request = ["--dataset", options.dataset, "--weights", options.weights]
    with tempfile.TemporaryDirectory() as folder, networks():
        root = Path(folder)
        with cluster(root / "scratch"):
            cut = threading.Thread(target=cut_off, args=(root / "there", options.cut_after), daemon=True)
            cut.start()
            found = features(root / "there", *request, "--scheduler", ADDRESS, within=within("icebox-a"))
        alone = features(root / "here", *request)
        found["same_rows"] = rows(root / "there") == rows(root / "here")
    print(json.dumps({"cut": not cut.is_alive(), "three machines": found, "here": alone}, indent=1))


def within(host: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", host, *command]


def run(*command: str) -> None:
    subprocess.run(command, check=True)


@contextmanager
def networks() -> Iterator[None]:
    try:
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "link", "set", BRIDGE, "up")
        for host, address in HOSTS.items():
            run("ip", "netns", "add", host)
            run("ip", "link", "add", f"{host[-1]}-br", "type", "veth", "peer", "name", "eth0", "netns", host)
            run("ip", "link", "set", f"{host[-1]}-br", "master", BRIDGE, "up")
            run("ip", "-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", host, "link", "set", "eth0", "up")
            run("ip", "-n", host, "link", "set", "lo", "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False, capture_output=True)


@contextmanager
def cluster(scratch: Path) -> Iterator[None]:
    lines = [within("icebox-a", *scheduler_line(ADDRESS))]
    for host in ("icebox-b", "icebox-c"):
        lines.append(within(host, *worker_line(ADDRESS, HOSTS[host], scratch), "--name", host))
    with running(lines):
        time.sleep(10)
        yield


def cut_off(data: Path, seconds: float) -> None:
    while not list(data.glob("cache/*/shards/[0-9a-f]*.h5")):
        time.sleep(0.5)
    time.sleep(seconds)
    run("ip", "link", "set", "c-br", "down")


if __name__ == "__main__":
    main()
