#!/usr/bin/env python3
r"""Answers images over HTTP: labels of a classifier, else features. LitServe batches the images of many clients.

    python scripts/serve.py google/vit-base-patch16-224 --vwt true
    curl -F image=@cat.jpg http://127.0.0.1:8000/predict
    curl --json '{"image": "<base64>"}' http://127.0.0.1:8000/predict

A classifier answers {"labels": [{"label": ..., "score": ...}, ...]}, the five best of its labels; any other model
{"features": [...]}: its image embedding, else its pooled output, else CLS or the mean of its tokens. An upload that
cannot be answered gets a status of 400 (no image, or one that is damaged, too large or too narrow), 408 (a body that
takes a minute), 413 (of over 32 MiB), 415 (of another type), 500 (the model fails on it, or answers NaN or infinity),
503 (too many requests at once) or 504 (it was not decoded, or not taken by the model, within --timeout), with
{"detail": the reason}. GET /health says "ok" once the model is loaded, /metrics counts requests, images, tokens and
seconds in the format of Prometheus, and /info names the model and its setting. HEAD asks for their status alone.
"""

# Annotations stay what they are, not strings: LitServe hands that of `decode_request` to FastAPI.
import argparse
import asyncio
import base64
import errno
import functools
import json
import math
import multiprocessing.connection
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, NamedTuple

import litserve
import numpy as np
import psutil
import torch
from fastapi import Depends, HTTPException, Request, Response
from litserve.loops.simple_loops import BatchedLoop
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from vwt_hf import processed_images
from vwt_hf.answers import (
    answer,
    are_finite,
    classifies,
    on_device,
    require_finite,
    require_label_names,
    require_labels,
)
from vwt_hf.cli.loading import add_device, add_dtype, load_model
from vwt_hf.decoding import UnreadableImage
from vwt_hf.embedding import require_features
from vwt_hf.printable import LONGEST, printable, shown
from vwt_hf.processes import usable_cores, usable_device
from vwt_hf.processors import load_processor
from vwt_hf.terminal import run_command, vwt_option
from vwt_hf.timing import return_memory
from vwt_hf.token_count import count_tokens

FIELD = "image"
DATA_URL = re.compile(r"\s*data:[^,]*;base64,", re.IGNORECASE)
"""What stands before the base64 of an image that a browser read."""
SPACE = dict.fromkeys(b" \t\r\n")
"""White space that programs put into base64, for `str.translate` to take out."""
LARGEST = 32 * 2**20
"""Bytes of a request's body that are read at most."""
SERVED = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "MPO")
"""Formats that are answered; Pillow decodes QOI and PPM in Python, in which all requests would wait for one."""
MOST_PIXELS = 40_000_000
"""Of an image, by default, as it comes and as it is resized before it is cropped: each takes some ten bytes, in as many
threads as there are cores."""
SLACK = 128 * 2**20
"""Bytes that a worker holds beyond what it needs before it gives them back, which takes a tenth of a batch's time:
batches of ever other sizes leave gaps in what the C library holds."""
MOST_REQUESTS = 128
"""Requests to /predict at once, by default: the body of each is held, of `LARGEST` bytes at most."""
WAITED = 30.0
"""Seconds that an image waits at most until a worker takes it, by default."""
MOST_VALUES = 1000
"""Values in a body of JSON, of which one is the image."""
SLOWEST = 60.0
"""Seconds in which a request's body must have come."""
MOST_TIMES = 16
"""An image processor that does not crop may make at most so many times the values of a square image."""
SQUARE = 1024
"""Pixels of a side of that square one."""
GRACE = 1.0
"""Seconds to wait, once the process that answers requests has ended, before that counts as a death."""
BEST = 5
"""Labels in an answer."""
SHORTEST = 0.001
"""Seconds that a worker waits for more images at least."""
PORTS = range(1024, 65536)
"""Those that LitServe takes."""
MOST_WORKERS = 4
"""Processes by default on a CPU: each holds a model."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    require_free(options.host, options.port)
    # Servers are forked from here: a pool of torch's threads would not come along, and its next use would hang.
    torch.set_num_threads(1)
    device = usable_device(options.device)
    cores = usable_cores()
    workers = options.workers or (min(MOST_WORKERS, cores) if device.type == "cpu" else 1)
    model = Model(options.model, options.vwt, options.dtype, max(1, cores // workers))
    setting, image_processor, values = tried(model, device)
    require_free(options.host, options.port)  # loading may have taken minutes
    return_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(prefix="vwt-serve-") as counts:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = counts
        server = Server(
            Answers(model, max_batch_size=options.max_batch_size, batch_timeout=options.batch_timeout),
            timeout=options.timeout,
            accelerator=device.type,
            devices="auto" if device.type == "cpu" else [device.index or 0],
            workers_per_device=workers,
            max_payload_size=LARGEST,
            middlewares=[(Bounded, {"most": options.max_requests}), Measured, Heads],
            model_metadata={"model": printable(options.model), "vwt": setting},
        )
        server.app.state.image_processor = image_processor
        server.app.state.most_values = MOST_TIMES * values
        server.app.state.timeout = options.timeout
        server.app.state.decoders = ThreadPoolExecutor(cores, "vwt-decode")
        server.app.add_route("/metrics", show_metrics)
        # Pillow only warns of images of more than that, up to twice as many.
        Image.MAX_IMAGE_PIXELS = options.max_pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        signal.signal(signal.SIGTERM, functools.partial(end, os.getpid()))
        print(f"{options.model}, vwt={json.dumps(setting)}: http://{options.host}:{options.port}/predict", flush=True)
        try:
            server.run(
                host=options.host,
                port=options.port,
                num_api_servers=1,
                log_level="warning",
                generate_client_file=False,
            )
        except (EOFError, ConnectionError):  # LitServe waits for a process that it has ended itself, if a worker dies
            if not server.died:
                raise
    if server.died:
        raise OSError(f"{server.died} ended by itself, as if it was killed.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a supported model")
    parser.add_argument(
        "--vwt",
        type=vwt_option,
        metavar="JSON",
        help="the setting, or true, or false (default: as the model was saved)",
    )
    parser.add_argument("--max-batch-size", type=int, default=8, help="images in one forward pass (default: 8)")
    parser.add_argument(
        "--batch-timeout", type=float, default=0.01, help="seconds to wait for more images (default: 0.01)"
    )
    parser.add_argument("--host", choices=("127.0.0.1", "0.0.0.0", "::"), default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help=f"from {PORTS[0]} to {PORTS[-1]} (default: 8000)")
    add_device(parser)
    add_dtype(parser)
    parser.add_argument(
        "--workers",
        type=int,
        help=f"processes that run the model (default: 1; on a CPU one for each core, up to {MOST_WORKERS})",
    )
    parser.add_argument(
        "--max-pixels", type=int, default=MOST_PIXELS, help=f"refuse images of more (default: {MOST_PIXELS:,})"
    )
    parser.add_argument(
        "--max-requests",
        type=int,
        default=MOST_REQUESTS,
        help=f"requests at once; more are answered by 503 (default: {MOST_REQUESTS})",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=WAITED,
        help=f"seconds that an image waits for its turn; then it is answered by 504 (default: {WAITED:g})",
    )
    options = parser.parse_args(arguments)
    if options.port not in PORTS:
        parser.error(f"--port takes a whole number from {PORTS[0]} to {PORTS[-1]}; given {options.port}.")
    asked = 1 if options.workers is None else options.workers
    numbers = (options.max_batch_size, options.max_pixels, options.max_requests, asked)
    if min(numbers) < 1 or not SHORTEST <= options.batch_timeout <= options.timeout < math.inf:
        whole = "--max-batch-size, --max-pixels, --max-requests and --workers take whole numbers from 1 on"
        given = f"{', '.join(map(str, numbers))} and {options.batch_timeout}, {options.timeout}"
        parser.error(f"{whole}, --batch-timeout {SHORTEST} seconds or more, --timeout as many; given {given}.")
    return options


def require_free(host: str, port: int) -> None:
    """Raises `OSError` if a server could not take the port, which LitServe tells only after its address is printed."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a server left behind is free
            server.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} of {host} is taken by another program; name a free one by --port.") from error
        raise OSError(
            f"port {port} of {host} cannot be had ({error.strerror}); name another --port or --host."
        ) from error


class Server(litserve.LitServer):
    """LitServe's server, which ends if a worker dies, and here also if the process that answers HTTP dies."""

    died: str | None = None
    """The process that ended by itself; `None` if none did."""
    ends = False
    """Whether LitServe ends its processes."""

    def _start_server(self, *args: Any, **kwargs: Any) -> Any:
        processes = super()._start_server(*args, **kwargs)
        watched = [each for each in processes.values() if hasattr(each, "sentinel")]  # on Windows they are threads
        if watched:
            threading.Thread(target=self._end_with, args=(watched,), daemon=True).start()
        return processes

    def _perform_graceful_shutdown(self, manager: Any, uvicorn_workers: Any, shutdown_reason: str = "normal") -> None:
        if "died" in shutdown_reason and not self.ends:
            self.died = self.died or "A worker"
            self.uvicorn_graceful_timeout = 5  # what the dead worker had taken is never answered
        self.ends = True
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another would cut this short
        super()._perform_graceful_shutdown(manager, uvicorn_workers, shutdown_reason)

    def _end_with(self, processes: Sequence[Any]) -> None:
        ended = multiprocessing.connection.wait([process.sentinel for process in processes])
        time.sleep(GRACE)  # a signal may reach all processes, and this one last
        if not self.ends:
            name = next(process.name for process in processes if process.sentinel in ended)
            self.died = f"{name}, which answers requests,"
            os.kill(os.getpid(), signal.SIGTERM)


def require_every_shape(model: Any, image_processor: Any) -> int:
    """Refuses a model that does not take images of all proportions as its image processor gives them: most uploads
    would be answered by errors.

    Returns:
        How many values the processor makes of a square image.

    Raises:
        ValueError: it does not, or answers one by NaN or infinity.
    """

    def made_of(*size: int) -> dict[str, torch.Tensor]:
        return processed_images.processed(Image.new("RGB", size, "grey"), image_processor)

    for size in ((320, 240), (240, 320)):
        made = made_of(*size)
        try:
            with torch.inference_mode():  # not `run`, which counts
                answers = answer(model, **on_device(made, model))
        except Exception as error:  # whatever a model says of it
            raise ValueError(
                f"{type(image_processor).__name__} makes {tuple(made['pixel_values'].shape)} of an image of "
                f"{size[0]}×{size[1]} pixels, which {type(model).__name__} does not take ({error}). Save an image "
                "processor with the model that resizes or crops images to one size."
            ) from error
        require_finite(model, are_finite(answers), ["a grey image"])
    return made_of(SQUARE, SQUARE)["pixel_values"].numel()


def end(first: int, *_: object) -> None:
    """Ends the process `first` as an interrupt does, so that LitServe ends all; a forked process ends at once."""
    if os.getpid() != first:
        os._exit(0)
    raise KeyboardInterrupt


class Model(NamedTuple):
    """Which model each worker loads, and how."""

    checkpoint: str
    vwt: Any
    """The setting; `None` for the one that the checkpoint was saved with."""
    dtype: str | None
    threads: int

    def load(self, device: torch.device) -> Any:
        return load_model(self.checkpoint, device, self.dtype, self.vwt)


def tried(model: Model, device: torch.device) -> tuple[Any, Any, int]:
    """The setting of a model, its image processor, and how many values that makes of a square image.

    Each worker loads a model of its own, on a GPU beside this one, which is tried and forgotten.

    Raises:
        ValueError: it cannot be served.
    """
    loaded = model.load(device)
    if classifies(loaded):
        require_labels(loaded, several=True)
        require_label_names(loaded)
    else:
        require_features(loaded)
    image_processor = load_processor(model.checkpoint)
    return loaded.config.vwt, image_processor, require_every_shape(loaded, image_processor)


async def upload(request: Request) -> bytes:
    """The encoded image of a request: the file of a form, or base64 in JSON."""
    if (coding := request.headers.get("content-encoding", "").strip().lower()) not in ("", "identity"):
        raise HTTPException(415, f"The body is in the Content-Encoding {coding}; expected none.")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        try:
            async with request.form(max_files=1, max_fields=1) as form:
                value = form.get(FIELD)
                if not isinstance(value, UploadFile):
                    raise HTTPException(400, _wants("a file", list(form), value))
                return await value.read()
        except (LookupError, UnicodeError) as error:  # names of fields, in the character set that the request states
            raise HTTPException(400, f"The form cannot be read ({error}); expected a file as {FIELD!r}.") from error
    if kind != "application/json":
        raise HTTPException(
            415, f"The body is {kind or 'of no type'}; expected multipart/form-data or application/json."
        )
    return await in_thread(request, _image_in_json, await request.body())


async def in_thread(request: Request, function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns that runs in a thread, so that others are answered meanwhile."""
    state = request.app.state
    made = asyncio.get_running_loop().run_in_executor(state.decoders, function, *args)
    try:
        return await asyncio.wait_for(made, state.timeout)
    except asyncio.TimeoutError:  # another than TimeoutError before Python 3.11
        raise HTTPException(
            504, f"The image was not decoded within {state.timeout:g} seconds; send a smaller one, or try later."
        ) from None


def _image_in_json(content: bytes) -> bytes:
    # Parsing takes 25 times as much memory, and no other thread runs meanwhile: values are counted first.
    if sum(map(content.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise HTTPException(400, f"The body is no JSON of an image (it holds more than {MOST_VALUES:,} values).")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"The body is no JSON ({error}).") from error
    value = body.get(FIELD) if isinstance(body, dict) else None
    if not isinstance(value, str):
        raise HTTPException(400, _wants("a string of base64", list(body) if isinstance(body, dict) else [], value))
    try:
        head = DATA_URL.match(value)
        return base64.b64decode(value[head.end() if head else 0 :].translate(SPACE), validate=True)
    except ValueError as error:
        raise HTTPException(400, f"{FIELD!r} is no base64 ({error}); URLs are not fetched.") from error


def _wants(what: str, names: Sequence[str], value: object) -> str:
    if value is not None or FIELD in names:
        return f"{FIELD!r} is a {type(value).__name__}; expected {what}. URLs are not fetched."
    found = ", ".join(shown(name[:LONGEST]) for name in names[:3])
    return f"There is no {FIELD!r}{found and f', only {found}'}; expected it to be {what}."


async def processed(request: Request) -> dict[str, np.ndarray]:
    """What the image processor makes of a request's image.

    Here, in the server's process, and not in `decode_request`: one error there is the answer to a whole batch.
    """
    state = request.app.state
    try:
        encoded = {"bytes": await upload(request), "path": None}
        return await in_thread(request, _process, encoded, state.image_processor, state.most_values)
    except UnreadableImage as error:
        raise HTTPException(400, str(error)) from error
    except ClientDisconnect as error:  # nobody is there to read this
        raise HTTPException(400, "The connection was closed within the body.") from error


def _process(encoded: dict[str, Any], image_processor: Any, most_values: int) -> dict[str, np.ndarray]:
    made = processed_images.processed(encoded, image_processor, formats=SERVED)
    if made["pixel_values"].numel() > most_values:
        raise UnreadableImage(
            f"The image becomes {tuple(made['pixel_values'].shape)}; expected {most_values:,} values at most. Crop it."
        )
    return {name: tensor.numpy() for name, tensor in made.items()}  # which queues copy, and do not share


class Ahead(NamedTuple):
    """A queue with one request before all others."""

    requests: list[Any]
    queue: Any

    def get(self, timeout: float | None = None) -> Any:
        return self.requests.pop() if self.requests else self.queue.get(timeout=timeout)


class Batches(BatchedLoop):
    """LitServe's loop, which here waits for a first request in place of asking a thousand times a second."""

    def get_batch_requests(self, lit_api: Any, request_queue: Any, transport: Any) -> Any:
        ahead = Ahead([request_queue.get()], request_queue)
        while True:
            found = super().get_batch_requests(lit_api, ahead, transport)
            if not ahead.requests:  # else its time was over before it took one
                return found


class Answers(litserve.LitAPI):
    """What a worker does: batches of processed images in, answers out."""

    def __init__(self, model: Model, **batching: Any) -> None:
        super().__init__(loop=Batches(), **batching)
        self.served = model

    def setup(self, device: str) -> None:
        torch.set_num_threads(self.served.threads)
        self.model = self.served.load(torch.device(device))
        self.process = psutil.Process()
        self.return_memory()

    def return_memory(self) -> None:
        return_memory()
        self.needed = self.process.memory_info().rss

    def decode_request(self, request: Annotated[dict[str, np.ndarray], Depends(processed)]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in request.items()}

    def predict(self, images: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor | None]:
        """For each image its row of logits or features; those of one size run as one batch. `None`: the model fails."""
        sizes: dict[Any, list[int]] = {}
        for place, image in enumerate(images):
            sizes.setdefault(tuple(tensor.shape for tensor in image.values()), []).append(place)
        answers: dict[int, torch.Tensor | None] = {}
        for places in sizes.values():
            answers |= zip(places, self.answers([images[place] for place in places]), strict=True)
        if self.process.memory_info().rss > self.needed + SLACK:
            self.return_memory()
        return [answers[place] for place in range(len(images))]

    def answers(self, images: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor | None]:
        """The answer to each of some images of one size; `None` if the model fails on it alone, too."""
        try:
            return list(run(self.model, {name: torch.cat([image[name] for image in images]) for name in images[0]}))
        except Exception as error:  # whatever a model raises: it is no reason to answer none of the others
            reason = f"{type(error).__name__}: {printable(error)}"
        if len(images) > 1:  # they may be too large together
            return [answer for image in images for answer in self.answers([image])]
        print(f"serve.py: the model failed on an image ({reason})", file=sys.stderr, flush=True)
        return [None]

    def encode_response(self, output: torch.Tensor | None) -> Any:
        if output is None:
            return JSONResponse({"detail": "The model fails on this image; the server's log says why."}, 500)
        if not output.isfinite().all():  # JSON has no such numbers. An error here would be that of a whole batch.
            return JSONResponse({"detail": "The model answers this image by NaN or infinity."}, 500)
        return encoded(self.model, output)


@torch.inference_mode()
def run(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits or features of processed images of one size, (images, values) float32, counted for /metrics."""
    start = time.perf_counter()
    with count_tokens(model) as count:
        answers = answer(model, **on_device(batch, model)).float().cpu()
    counts = metrics()
    counts.seconds.labels("forward").observe(time.perf_counter() - start)
    counts.images.inc(len(answers))
    counts.tokens.inc(count.mean * count.images)
    return answers


def encoded(model: Any, output: torch.Tensor) -> dict[str, Any]:
    """The answer to a request in JSON, from a row of logits or features."""
    if not classifies(model):
        return {"features": output.tolist()}
    # As transformers' pipeline for image-classification does.
    several = model.config.problem_type == "multi_label_classification" or len(output) == 1
    best = (output.sigmoid() if several else output.softmax(-1)).topk(min(BEST, len(output)))
    names = model.config.id2label
    return {
        "labels": [
            {"label": names[label], "score": score}
            for score, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
    }


@functools.cache
def metrics() -> types.SimpleNamespace:
    """The counters of this process, which are summed over all processes."""
    # Not from the top: when it is imported, it looks for the folder that processes share.
    from prometheus_client import Counter, Histogram

    return types.SimpleNamespace(
        requests=Counter("vwt_requests", "Requests to /predict that were answered.", ["status"]),
        images=Counter("vwt_images", "Images that the model ran on."),
        tokens=Counter("vwt_tokens", "Tokens of these images, prefix tokens included: means over the layers."),
        seconds=Histogram("vwt_seconds", "Of whole requests, and of forward passes of one batch each.", ["of"]),
    )


async def show_metrics(request: Request) -> Response:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class Bounded:
    """Middleware that refuses requests to /predict beyond the most at once, and those whose body does not come."""

    def __init__(self, app: Any, most: int) -> None:
        self.app = app
        self.most = most
        self.held = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") != "/predict":
            return await self.app(scope, receive, send)
        if self.held >= self.most:
            detail = f"{self.held} requests are being answered, and no more are taken at once; ask again later."
            return await JSONResponse({"detail": detail}, 503, {"Retry-After": "1"})(scope, receive, send)
        end, is_whole = time.monotonic() + SLOWEST, False

        async def receive_in_time() -> Any:
            nonlocal is_whole
            if is_whole:  # what comes next is that the client has left
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0, end - time.monotonic()))
            except asyncio.TimeoutError:  # another than TimeoutError before Python 3.11
                said = f"The body has not come within {SLOWEST:g} seconds."
                raise HTTPException(408, said, {"Connection": "close"}) from None
            is_whole = not message.get("more_body", False)
            return message

        self.held += 1
        try:
            await self.app(scope, receive_in_time, send)
        finally:
            self.held -= 1


class Heads:
    """Middleware that answers HEAD, by which some probes ask for /health, as GET; uvicorn leaves the body out."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope | {"method": "GET"} if scope.get("method") == "HEAD" else scope, receive, send)


class Measured:
    """Middleware that counts requests to /predict by the status of their answers, and times them."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") != "/predict":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 500

        async def send_on(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        finally:
            metrics().requests.labels(status).inc()
            metrics().seconds.labels("request").observe(time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(run_command("serve.py", main))
