#!/usr/bin/env python3
r"""How many images a second `scripts/serve.py` answers, and whether rightly, under load.

Starts a server of the plain model, then one of each setting; clients of this machine send it photographs, each client
the next one as soon as it has its answer. Prints a row for each server and number of clients: images a second (ratio:
of the plain server's), milliseconds until half and 95 % of the answers were there, milliseconds of a core that the
server spent on an image, images in a forward pass, tokens of an image; and the memory of all its processes, in MiB,
over each tenth of the time.
Every answer is compared with that of the same model for the photograph alone. Wrong: another label, or a score (of
features: a value of the unit vector) that is off by more than --tolerance. Ties: another label, where the scores of the
first two are nearer than that. Errors: no answer.

    python scripts/load.py --model my-model --images photographs/
    python scripts/load.py --model my-model --images photographs/ --vwt true --minutes 10  # memory, too, without plain
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import math
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil
import torch
import transformers
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from serve import FIELD, Model, encoded, run
from vwt_hf.checks import is_number
from vwt_hf.evaluate_model import name_of
from vwt_hf.image_source import find_images
from vwt_hf.printable import printable
from vwt_hf.processed_images import pixel_batches
from vwt_hf.processes import usable_device
from vwt_hf.processors import load_processor
from vwt_hf.terminal import json_file, markdown, require_alone, require_whole_options, run_command, vwt_option
from vwt_hf.whole_saves import require_writable, write_file

SETTINGS: tuple[Any, ...] = (True, {"keep_ratio": 0.5})
STARTING = 300
"""Seconds until a server must have loaded its model."""
WARM_UP = 3
"""Seconds of load that do not count."""
PARTS = 10
"""Of the time; memory is the mean over each. Its growth is from the second, when all is warm, to the last."""


class Photograph(NamedTuple):
    """What is sent, and what must come back."""

    encoded: bytes
    expected: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of a supported model")
    parser.add_argument("--images", required=True, type=Path, help="folder of images, searched through all levels")
    parser.add_argument("--vwt", action="append", type=vwt_option, help="a setting as JSON; may be given several times")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="at a time (default: 1 8 32)")
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement (default: 20)")
    parser.add_argument(
        "--minutes", type=float, help="in place of the table: only the most clients, so long, and memory"
    )
    parser.add_argument(
        "--limit", type=int, default=64, help="photographs (default: 64), spread evenly over the folder"
    )
    parser.add_argument("--tolerance", type=float, default=1e-4, help="by which a score may be off (default: 1e-4)")
    parser.add_argument("--serve", default="", metavar="OPTIONS", help="more options of serve.py, as one argument")
    parser.add_argument("--json", type=json_file, help="also write the rows here, after each")
    options = parser.parse_args(arguments)
    require_alone()
    require_writable(options.json)
    require_whole_options(options, "limit", "clients")
    for name in ("seconds", "minutes", "tolerance"):
        value = getattr(options, name)
        if value is not None and not is_number(value, 0):
            raise ValueError(f"--{name} is {value}; expected a finite number of at least 0.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that servers are ended, too
    settings = options.vwt or SETTINGS
    paths = find_images([options.images], options.limit)
    print(
        f"{printable(options.model)}, {len(paths)} photographs, serve.py {options.serve}, transformers "
        f"{transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} cores"
    )
    of_server = argparse.ArgumentParser(add_help=False)
    of_server.add_argument("--dtype")
    of_server.add_argument("--device")
    served, _ = of_server.parse_known_args(options.serve.split())
    device = usable_device(served.device)
    rows = []
    for setting in settings if options.minutes else (False, *settings):
        photographs = alone(options.model, setting, served.dtype, device, paths)
        with serving(options.model, setting, options.serve.split()) as server:
            for clients in [max(options.clients)] if options.minutes else options.clients:
                seconds = 60 * options.minutes if options.minutes else options.seconds
                rows.append(measure(server, photographs, clients, seconds, options.tolerance))
                rows[-1] = {"setting": name_of(setting or None), "clients": clients, "ratio": None} | rows[-1]
                if options.json:
                    write_file(options.json, json.dumps(rows, indent=1))
    plain = {row["clients"]: row["images / s"] for row in rows if row["setting"] == name_of(None)}
    for row in rows:
        if row["clients"] in plain:
            row["ratio"] = rounded(row["images / s"], plain[row["clients"]], 2)
    print(markdown(rows), end="")
    if options.json:
        write_file(options.json, json.dumps(rows, indent=1))


def alone(
    checkpoint: str, setting: Any, dtype: str | None, device: torch.device, paths: Sequence[Path]
) -> list[Photograph]:
    """Photographs with the answer to each by itself."""
    model = Model(checkpoint, setting, dtype, torch.get_num_threads()).load(device)
    made = pixel_batches(paths, load_processor(checkpoint), 1)
    label = f"{name_of(setting or None)}: alone"
    with tqdm(zip(paths, made, strict=True), label, len(paths), leave=False) as bar:
        photographs = [Photograph(path.read_bytes(), encoded(model, run(model, batch)[0])) for path, batch in bar]
    del model
    gc.collect()
    return photographs


@contextlib.contextmanager
def serving(checkpoint: str, setting: Any, more: Sequence[str]) -> Iterator[Server]:
    """A server that has loaded its model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("serve.py")
    command = [sys.executable, str(script), checkpoint, "--vwt", json.dumps(setting), "--port", str(port), *more]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        server = Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
        try:
            end = time.monotonic() + STARTING
            while not server.is_ready():
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"serve.py did not start (status {process.poll()}); its last lines say why.")
                time.sleep(0.2)
            yield server
        finally:
            process.terminate()
            process.wait(60)


class Server(NamedTuple):
    """Where a server is, and its first process."""

    url: str
    process: psutil.Process

    def is_ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False

    def counts(self) -> dict[str, float]:
        """What it has counted: images, tokens, batches, and seconds of its processes on a core."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=5).read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        names = {"vwt_images_total": "images", "vwt_tokens_total": "tokens"}
        # What was never counted is not there, for example if all answers are errors.
        counted = dict.fromkeys(names.values(), 0.0)
        counted |= {names[sample.name]: sample.value for sample in samples if sample.name in names}
        of_batches = (s.value for s in samples if s.name == "vwt_seconds_count" and s.labels["of"] == "forward")
        seconds = sum(sum(process.cpu_times()[:2]) for process in self.processes())
        return counted | {"batches": sum(of_batches), "core seconds": seconds}

    def memory(self) -> int:
        """Bytes in memory of all its processes."""
        return sum(process.memory_info().rss for process in self.processes())

    def processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]


def measure(
    server: Server, photographs: Sequence[Photograph], clients: int, seconds: float, tolerance: float
) -> dict[str, Any]:
    """A row of the table."""
    asyncio.run(load(server, photographs, clients, WARM_UP))
    before, start = server.counts(), time.perf_counter()
    replies, memory = asyncio.run(load(server, photographs, clients, seconds))
    taken = time.perf_counter() - start  # the last answers come a little after the time
    counted = {name: value - before[name] for name, value in server.counts().items()}
    found = [(judged(reply, photographs[which].expected, tolerance), wait) for which, wait, reply in replies]
    verdicts = Counter(verdict for verdict, _ in found)
    # Without errors, which come at once if a request is turned away.
    waits = sorted(wait for verdict, wait in found if verdict != "error")
    ends = [len(memory) * part // PARTS for part in range(PARTS + 1)]
    tenths = [statistics.mean(memory[start:end] or memory) / 2**20 for start, end in itertools.pairwise(ends)]
    return {
        "images / s": round((verdicts["right"] + verdicts["tie"] + verdicts["wrong"]) / taken, 2),
        "p50 ms": round(1000 * statistics.median(waits)) if waits else None,
        "p95 ms": round(1000 * waits[math.ceil(0.95 * len(waits)) - 1]) if waits else None,
        "core ms": rounded(1000 * counted["core seconds"], counted["images"], 1),
        "batch": rounded(counted["images"], counted["batches"], 1),
        "tokens": rounded(counted["tokens"], counted["images"], 1),
        "answers": len(replies),
        "wrong": verdicts["wrong"],
        "ties": verdicts["tie"],
        "errors": verdicts["error"],
        "growth %": round(100 * (tenths[-1] / tenths[1] - 1), 2),
        "MiB": " ".join(map("{:.0f}".format, tenths)),
    }


def rounded(value: float, count: float, digits: int) -> float | None:
    """`value` / `count`, rounded; `None` if `count` is 0."""
    return round(value / count, digits) if count else None


async def load(
    server: Server, photographs: Sequence[Photograph], clients: int, seconds: float
) -> tuple[list[tuple[int, float, Any]], list[int]]:
    """For each request its photograph, the seconds until its answer, and the answer; and the memory of each second."""
    replies: list[tuple[int, float, Any]] = []
    memory = [server.memory()]
    order = itertools.cycle(range(len(photographs)))
    end = time.perf_counter() + seconds

    async def client(session: aiohttp.ClientSession) -> None:
        while (start := time.perf_counter()) < end:
            which = next(order)
            reply = await ask(session, f"{server.url}/predict", photographs[which].encoded)
            replies.append((which, time.perf_counter() - start, reply))

    async def watch() -> None:
        while time.perf_counter() < end:
            await asyncio.sleep(1)
            memory.append(server.memory())

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        await asyncio.gather(watch(), *(client(session) for _ in range(clients)))
    return replies, memory


async def ask(session: aiohttp.ClientSession, url: str, image: bytes) -> Any:
    """The answer to an image, or what went wrong as text."""
    form = aiohttp.FormData()
    form.add_field(FIELD, image, filename="photograph")
    try:
        async with session.post(url, data=form) as response:
            return await (response.json() if response.status == 200 else response.text())
    except (aiohttp.ClientError, TimeoutError) as error:
        return repr(error)


def judged(reply: Any, expected: dict[str, Any], tolerance: float) -> str:
    """Whether an answer is right, a tie, wrong, or an error."""
    if not isinstance(reply, dict) or reply.keys() != expected.keys():
        return "error"
    if "features" in expected:
        size = math.hypot(*expected["features"])
        pairs = zip(reply["features"], expected["features"], strict=True)
        return "right" if all(abs(a - b) <= tolerance * size for a, b in pairs) else "wrong"
    given, wanted = reply["labels"], expected["labels"]
    if any(abs(a["score"] - b["score"]) > tolerance for a, b in zip(given, wanted, strict=True)):
        return "wrong"
    if given[0]["label"] == wanted[0]["label"]:
        return "right"
    return "tie" if len(wanted) > 1 and wanted[0]["score"] - wanted[1]["score"] <= 2 * tolerance else "wrong"


if __name__ == "__main__":
    sys.exit(run_command("load.py", main))
