"""`scripts/serve.py`: each upload gets a right answer or a status that says why not, and the server lives on."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
import transformers
from PIL import Image

from settings import ViTImageProcessor
from tiny import tiny_model
from vwt_hf import count_tokens
from vwt_hf.terminal import run_command

pytest.importorskip("litserve")
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import load
import serve
from serve import require_free

pytestmark = pytest.mark.newest

SETTING = {"method": "local", "tolerance": 0.1}
SECONDS = 300
"""Until whatever is waited for must have come."""


class Running(NamedTuple):
    """A server of this machine."""

    port: int
    process: psutil.Process
    log: Path
    model: Any
    """What it runs, in this process."""

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, **how: Any) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {}, **how)
            answer = connection.getresponse()
            text = answer.read().decode()
        is_json = answer.headers["content-type"] == "application/json"
        return Reply(answer.status, json.loads(text) if text and is_json else text)

    def upload(self, image: bytes, field: str = "image", parts: int = 1) -> Reply:
        head = f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="a"\r\n\r\n'.encode()
        body = (head + image + b"\r\n") * parts + b"--x--\r\n"
        return self.ask("POST", "/predict", body, {"Content-Type": "multipart/form-data; boundary=x"})

    def send(self, value: Any) -> Reply:
        return self.ask("POST", "/predict", json.dumps(value), {"Content-Type": "application/json"})


class Reply(NamedTuple):
    status: int
    body: Any


def checkpoint(folder: Path, name: str) -> Path:
    tiny_model(name).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def running(folder: Path, *options: str) -> Iterator[Running]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log.txt"
    command = [sys.executable, serve.__file__, str(folder), "--port", str(port), *options]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        everything = psutil.Process(process.pid)
        model = serve.Model(str(folder), SETTING, None, 1).load(torch.device("cpu"))
        running = Running(port, everything, log, model)
        try:
            end = time.monotonic() + SECONDS
            while process.poll() is None and time.monotonic() < end:
                with contextlib.suppress(OSError):
                    if running.ask("GET", "/health") == (200, "ok"):
                        break
                time.sleep(0.1)
            else:
                pytest.fail(log.read_text())
            yield running
        finally:
            lives = process.poll() is None
            said = log.read_text() if lives else ""  # processes that end at once may miss one another and say so
            others = everything.children(recursive=True) if lives else []
            process.terminate()
            left = psutil.wait_procs([*others], timeout=SECONDS)[1]
            for other in left:
                other.kill()
            process.wait(SECONDS)
    assert not left and "Traceback" not in said
    if lives:
        assert process.returncode == 0 and "ended by itself" not in log.read_text()


@pytest.fixture(autouse=True)
def usual_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual port, on which these tests serve nothing, may be taken by another program on this machine."""
    monkeypatch.setattr(serve, "require_free", lambda *_: None)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Of a classifier, one process that takes up to four images at once and waits for them."""
    folder = checkpoint(tmp_path_factory.mktemp("classifier"), "vit-classifier")
    options = ("--max-batch-size", "4", "--batch-timeout", "0.2", "--workers", "1")
    with running(folder, "--vwt", json.dumps(SETTING), *options) as server:
        yield server


def drawn(seed: int = 0, height: int = 40, width: int = 50) -> Image.Image:
    """Noise with a flat part, of another size for each seed, so that images have different numbers of tokens."""
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    values[: height * (seed % 4) // 4] = 90
    return Image.fromarray(values)


def file(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def alone(model: Any, image: Image.Image) -> dict[str, Any]:
    """The answer to one RGB image."""
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    return serve.encoded(model, serve.run(model, dict(processor(images=[image], return_tensors="pt")))[0])


def require_answer(reply: Reply, server: Running, image: Image.Image) -> None:
    assert reply.status == 200, reply
    assert load.judged(reply.body, alone(server.model, image), 1e-5) == "right"


def test_an_upload_and_base64_are_answered_as_the_image_alone(server: Running):
    image = drawn(1)
    require_answer(server.upload(file(image)), server, image)
    require_answer(server.send({"image": base64.b64encode(file(image)).decode()}), server, image)
    require_answer(server.send({"image": base64.encodebytes(file(image)).decode()}), server, image)  # in lines
    for head in ("data:image/png;base64,", "data:;base64,", "DATA:image/png;name=a.png;charset=utf-8;BASE64,"):
        require_answer(server.send({"image": head + base64.b64encode(file(image)).decode()}), server, image)
    labels = server.upload(file(image)).body["labels"]
    assert {label["label"] for label in labels} == {"LABEL_0", "LABEL_1"}
    assert sum(label["score"] for label in labels) == pytest.approx(1)


def test_head_asks_for_the_status_alone(server: Running):
    assert server.ask("HEAD", "/health") == (200, "")
    assert server.ask("HEAD", "/nothing").status == 404 and server.ask("HEAD", "/predict").status == 405


def test_a_body_that_states_no_coding_is_read(server: Running):
    image = drawn(1)
    content = json.dumps({"image": base64.b64encode(file(image)).decode()})
    for coding in ("", "identity"):
        headers = {"Content-Type": "application/json", "Content-Encoding": coding}
        require_answer(server.ask("POST", "/predict", content, headers), server, image)


def sample(server: Running, name: str) -> float:
    text = server.ask("GET", "/metrics").body
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_images_of_every_kind_are_answered_as_they_are_seen(server: Running):
    """Upright, in eight bits, in RGB, the first of several frames."""
    image = drawn(2)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held sideways: to be seen it is turned by 90° clockwise
    grey = np.asarray(image.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    palette = image.quantize(32)
    kinds = {
        "rotated": (file(image, exif=turned), image.transpose(Image.Transpose.ROTATE_270)),
        "16 bits": (file(deep), Image.fromarray(grey).convert("RGB")),
        "animated": (
            file(palette, "GIF", save_all=True, append_images=[drawn(3).quantize(32)]),
            palette.convert("RGB"),
        ),
        "black and white": (file(image.convert("1")), image.convert("1").convert("RGB")),
        "transparent": (file(image.convert("RGBA")), image),
        "one pixel": (file(drawn(2, 1, 1)), drawn(2, 1, 1)),
        "a line": (file(drawn(2, 1, 3000)), drawn(2, 1, 3000)),
        "a column": (file(drawn(2, 3000, 2)), drawn(2, 3000, 2)),
    }
    inks = file(image.convert("CMYK"), "JPEG", quality=95)
    kinds["CMYK"] = (inks, Image.open(io.BytesIO(inks)).convert("RGB"))
    for name, (encoded, seen) in kinds.items():
        reply = server.upload(encoded)
        assert reply.status == 200, (name, reply)
        require_answer(reply, server, seen)
    different = alone(server.model, image), alone(server.model, kinds["rotated"][1])
    assert load.judged(*different, 1e-5) == "wrong"  # else turning would prove nothing


def bomb(width: int, height: int) -> bytes:
    """A small file that is a large white PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(1 + -(-width // 8)) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_what_cannot_be_answered_gets_a_status_and_a_reason(server: Running):
    whole = file(drawn(4, 400, 500), "JPEG")
    unreadable = {
        "truncated": (whole[: len(whole) // 2], "truncated"),
        "empty": (b"", "cannot be read"),
        "text": (b"I am no image.\n" * 99, "cannot be read"),
        "20,000 pixels": (bomb(20_000, 20_000), "MAX_IMAGE_PIXELS, 40,000,000, allows"),
        "7,000 pixels": (bomb(7_000, 7_000), "MAX_IMAGE_PIXELS, 40,000,000, allows"),
        "no format of photographs": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),
        "decoded in Python": (file(drawn(4, 40, 50), "QOI"), "no image of a known format"),
    }
    for name, (encoded, reason) in unreadable.items():
        for reply in (server.upload(encoded), server.send({"image": base64.b64encode(encoded).decode()})):
            assert reply.status == 400 and reason in reply.body["detail"], (name, reply)
            assert "0x" not in reply.body["detail"], "an address in the server's memory"
    form, js = {"Content-Type": "multipart/form-data; boundary=x"}, {"Content-Type": "application/json"}
    charset = {"Content-Type": "multipart/form-data; boundary=x; charset=undefined"}
    odd = b'--x\r\nContent-Disposition: form-data; name="im\xffage"\r\n\r\nx\r\n--x--\r\n'
    text = b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nhttp://127.0.0.1/a.png\r\n--x--\r\n'
    wrong: list[tuple[Reply, int, str]] = [
        (server.upload(whole, field="photo"), 400, "no 'image', only 'photo'"),
        (server.upload(whole, parts=2), 400, "Too many files"),
        (server.ask("POST", "/predict", b"--x--\r\n", form), 400, "There is no 'image'; expected it to be"),
        (server.ask("POST", "/predict", odd, charset), 400, "The form cannot be read"),
        (server.ask("POST", "/predict", odd.replace(b"\xff", b""), charset), 400, ""),
        (server.ask("POST", "/predict", text, form), 400, "URLs are not fetched"),
        (server.ask("POST", "/predict", whole, form), 400, ""),
        (server.ask("POST", "/predict", whole, {"Content-Type": "image/jpeg"}), 415, "image/jpeg"),
        (server.ask("POST", "/predict", b""), 415, "no type"),
        (server.ask("POST", "/predict", b"\x1f\x8b", js | {"Content-Encoding": "gzip"}), 415, "gzip; expected none"),
        (server.ask("POST", "/predict", b"{", js), 400, "no JSON"),
        (server.ask("POST", "/predict", b"[" * serve.MOST_VALUES, js), 400, "no JSON"),
        (server.ask("POST", "/predict", b'{"x": [' + b"[]," * 10**6 + b"0]}", js), 400, "no JSON of an image"),
        (server.send({"\U0010ffff" * 10**6: 1}), 400, "only '"),
        (server.send([]), 400, "no 'image'"),
        (server.send({"image": None}), 400, "'image' is a NoneType; expected a string of base64"),
        (server.send({"images": "eA=="}), 400, "only 'images'"),
        (server.send({"image": 7}), 400, "'image' is a int; expected a string of base64"),
        (server.send({"image": "eA=!"}), 400, "no base64"),
        (server.send({"image": "http://127.0.0.1:1/a.png"}), 400, "URLs are not fetched"),
        (server.send({"image": "data:image/png,x"}), 400, "no base64"),
        (server.send({"image": "eA==data:;base64,eA=="}), 400, "no base64"),
        (server.ask("GET", "/predict"), 405, "Not Allowed"),
    ]
    for reply, status, reason in wrong:
        assert len(reply.body["detail"]) < 1000
        assert reply.status == status and reason in reply.body["detail"], (reply, status, reason)
    require_answer(server.upload(whole), server, Image.open(io.BytesIO(whole)))


def test_no_url_is_fetched(server: Running):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.5)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"
        assert server.send({"image": url}).status == 400
        assert server.upload(url.encode()).status == 400
        with pytest.raises(TimeoutError):
            listening.accept()


@pytest.mark.parametrize("length_is_told", [True, False])
def test_a_body_of_200_mb_is_refused_and_not_held(server: Running, length_is_told: bool):
    block = bytes(2**20)
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        yield head
        for _ in range(200):
            sent += len(block)
            yield block

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    if length_is_told:
        headers["Content-Length"] = str(len(head) + 200 * len(block))
    before = sum(process.memory_info().rss for process in (server.process, *server.process.children(recursive=True)))
    reply = server.ask("POST", "/predict", body(), headers, encode_chunked=not length_is_told)
    after = sum(process.memory_info().rss for process in (server.process, *server.process.children(recursive=True)))
    assert reply.status == 413 and "large" in reply.body["detail"]
    assert after - before < 3 * serve.LARGEST < 200 * len(block)
    require_answer(server.upload(file(drawn(5))), server, drawn(5))


def test_a_client_that_goes_away_harms_no_other(server: Running):
    with socket.create_connection(("127.0.0.1", server.port), SECONDS) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\nContent-Type: application/json\r\n\r\n{"
        )
    require_answer(server.upload(file(drawn(6))), server, drawn(6))


def test_many_clients_share_forward_passes_and_a_bad_upload_among_them_is_refused_alone(server: Running):
    images = [drawn(seed) for seed in range(12)]
    before = {name: sample(server, name) for name in ("vwt_images_total", "vwt_tokens_total", BATCHES, REFUSED)}
    with concurrent.futures.ThreadPoolExecutor(16) as clients:
        bad = [clients.submit(server.upload, b"no image") for _ in range(4)]
        good = [clients.submit(server.upload, file(image)) for image in images]
        for future, image in zip(good, images, strict=True):
            require_answer(future.result(SECONDS), server, image)
        assert all(future.result(SECONDS).status == 400 for future in bad)
    counted = {name: sample(server, name) - count for name, count in before.items()}
    assert counted["vwt_images_total"] == 12 and counted[REFUSED] == 4
    assert 3 <= counted[BATCHES] < 12
    with count_tokens(server.model) as count:
        for image in images:
            alone(server.model, image)
    assert counted["vwt_tokens_total"] == pytest.approx(count.mean * 12) and count.mean < 60  # of 65


BATCHES, REFUSED = 'vwt_seconds_count{of="forward"}', 'vwt_requests_total{status="400"}'


def test_info_names_the_model_and_its_whole_setting(server: Running):
    assert server.ask("GET", "/info").body["model"]["vwt"] == server.model.config.vwt


def test_a_model_without_a_classifier_gives_features_by_the_setting_that_it_was_saved_with(tmp_path: Path):
    folder = checkpoint(tmp_path / "model", "dinov2")
    served(folder, SETTING).model.save_pretrained(folder)
    api = served(folder, None)
    assert api.model.config.vwt["method"] == "local"
    pixel_values = torch.randn(1, 3, 32, 32)
    (features,) = api.predict([{"pixel_values": pixel_values}])
    assert api.encode_response(features) == {"features": features.tolist()}
    with torch.inference_mode():
        torch.testing.assert_close(features, api.model(pixel_values).pooler_output[0])
    assert served(folder, False).model.config.vwt is None


def served(folder: Path, vwt: Any) -> serve.Answers:
    """What a worker is once it is set up."""
    threads = torch.get_num_threads()
    api = serve.Answers(serve.Model(str(folder), vwt, None, threads), max_batch_size=4, batch_timeout=0.1)
    api.setup("cpu")
    return api


def test_a_worker_gives_back_memory_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    api, held, returned = served(checkpoint(tmp_path / "model", "dinov2"), SETTING), 2**30, []

    def give_back() -> None:
        nonlocal held
        returned.append(held)
        held = 2**30 + 2**20 * len(returned)  # a little more is needed each time

    monkeypatch.setattr(serve, "return_memory", give_back)
    monkeypatch.setattr(api.process, "memory_info", lambda: SimpleNamespace(rss=held))
    api.return_memory()
    for _ in range(9):
        held += serve.SLACK // 3
        api.predict([{"pixel_values": torch.randn(1, 3, 32, 32)}])
    first, *later = returned
    assert first == 2**30 and len(later) == 2
    for number, had in enumerate(later):
        assert 0 < had - (2**30 + 2**20 * (number + 1)) - serve.SLACK <= serve.SLACK // 3


@pytest.mark.parametrize("seconds", [0.0, 0.02, 5.0])
def test_requests_are_batched_in_their_order_and_none_is_lost_where_the_time_is_over_at_once(tmp_path: Path, seconds):
    api = served(checkpoint(tmp_path / "model", "vit"), SETTING)
    api.request_timeout = -1  # which a server sets
    requests = queue.Queue()
    for number in range(9):
        requests.put((0, number, 0.0, f"image {number}"))
    taken, times = [], []

    class Clock:
        """Time goes on by so much from one look to the next, and after some by less."""

        def monotonic(self) -> float:
            times.append(seconds if len(times) < 6 else 0.02)
            return sum(times)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("litserve.loops.base.time", Clock())
        while len(taken) < 9:
            batch, late = serve.Batches().get_batch_requests(api, requests, None)
            assert 0 < len(batch) <= 4 and not late
            taken += batch
    assert taken == [(0, number, f"image {number}") for number in range(9)] and requests.empty()


def test_images_of_different_sizes_run_in_batches_of_one_size(tmp_path: Path):
    folder = checkpoint(tmp_path / "model", "dinov2")
    api = served(folder, SETTING)
    sizes = (32, 48, 32, 40)
    images = [{"pixel_values": torch.randn(1, 3, 32, size)} for size in sizes]
    shapes = []
    api.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["pixel_values"].shape)), with_kwargs=True
    )
    together = api.predict(images)
    assert sorted(shapes) == [(1, 3, 32, 40), (1, 3, 32, 48), (2, 3, 32, 32)]
    for image, found in zip(images, together, strict=True):
        torch.testing.assert_close(found, serve.run(api.model, image)[0])


def test_what_cannot_be_served_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = checkpoint(tmp_path / "model", "vit")
    for given, reason in (
        ([str(tmp_path / "nothing")], "nothing"),
        ([str(folder), "--vwt", '{"keep_ratio": 2}'], "keep_ratio"),
        ([str(folder), "--device", "abacus"], "abacus"),
    ):
        assert run_command("serve.py", lambda given=given: serve.main(given)) == 2
        said = capsys.readouterr().err
        assert reason in said and "Traceback" not in said
    with pytest.raises(SystemExit):
        serve.main([str(folder), "--batch-timeout", "0"])
    with pytest.raises(SystemExit):
        serve.main([str(folder), "--port", "80"])
    assert "--port takes a whole number from 1024 to 65535; given 80." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        serve.main([str(folder), "--batch-timeout", "5", "--timeout", "1"])


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(serve, "require_free", require_free)
    monkeypatch.setattr(serve, "tried", pytest.fail)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert run_command("serve.py", lambda: serve.main(["nowhere", "--port", str(port)])) == 2
    printed = capsys.readouterr()
    assert f"port {port} of 127.0.0.1 is taken by another program; name" in printed.err and not printed.out
    require_free("127.0.0.1", port)
    with pytest.raises(OSError, match=r"port 8000 of 192\.0\.2\.1 cannot be had \(.*\); name another"):
        require_free("192.0.2.1", 8000)  # of no machine


def test_a_port_that_is_taken_while_the_model_is_loaded_is_told_before_the_address(monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]

        def tried(*_: Any) -> tuple[Any, Any, int]:
            other.listen()
            return None, None, 1

        monkeypatch.setattr(serve, "tried", tried)
        monkeypatch.setattr(serve, "require_free", require_free)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that it is free until it is listened to
        assert run_command("serve.py", lambda: serve.main(["nowhere", "--port", str(port)])) == 2
    printed = capsys.readouterr()
    assert f"port {port} of 127.0.0.1 is taken by another program; name" in printed.err and not printed.out


def test_a_classifier_without_names_for_all_its_labels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = checkpoint(tmp_path / "model", "vit-classifier")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {1: "a", 2: "b"}, "label2id": {}}))
    assert run_command("serve.py", lambda: serve.main([str(folder)])) == 2
    said = capsys.readouterr().err
    assert "names the labels [1, 2]; expected 2 numbers from 0 on" in said


def test_quantities_and_features_of_patches_left_out_at_random_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, change, reason in (
        ("vit-classifier", {"problem_type": "regression"}, "it gives quantities, which are no labels"),
        ("vit-mae", {"mask_ratio": 0.75}, "drops 75% of the patches at random"),
    ):
        folder = checkpoint(tmp_path / name, name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        assert run_command("serve.py", lambda folder=folder: serve.main([str(folder)])) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize("size", [(1_000_000, 4), (2, 2000)])
def test_an_upload_that_would_take_all_memory_once_resized_gets_400_and_the_reason(size, monkeypatch):
    async def upload(_: Any) -> bytes:
        return bomb(*size)

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", serve.MOST_PIXELS)
    monkeypatch.setattr(serve, "upload", upload)
    with concurrent.futures.ThreadPoolExecutor(1) as decoders:
        processor = transformers.CLIPImageProcessorPil()
        state = SimpleNamespace(image_processor=processor, decoders=decoders, most_values=10**9, timeout=SECONDS)
        with pytest.raises(serve.HTTPException, match=r"pixels .*Crop it if it is narrow") as raised:
            asyncio.run(serve.processed(SimpleNamespace(app=SimpleNamespace(state=state))))
    assert raised.value.status_code == 400


def test_an_image_that_waits_too_long_for_its_decoding_gets_504(monkeypatch):
    async def upload(_: Any) -> bytes:
        return file(drawn(1, 40, 50))

    monkeypatch.setattr(serve, "upload", upload)
    with concurrent.futures.ThreadPoolExecutor(1) as decoders:
        is_over = threading.Event()
        decoders.submit(is_over.wait, SECONDS)  # an image that takes long
        state = SimpleNamespace(image_processor=None, decoders=decoders, most_values=10**9, timeout=0.05)
        with pytest.raises(serve.HTTPException, match=r"not decoded within 0\.05 seconds") as raised:
            asyncio.run(serve.processed(SimpleNamespace(app=SimpleNamespace(state=state))))
        is_over.set()
    assert raised.value.status_code == 504


def test_a_model_that_does_not_take_images_of_all_proportions_is_not_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = checkpoint(tmp_path / "model", "vit-classifier")
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False)
    processor.save_pretrained(folder)
    assert run_command("serve.py", lambda: serve.main([str(folder)])) == 2
    said = capsys.readouterr().err
    assert "(1, 3, 32, 42) of an image of 320×240 pixels, which ViTForImageClassification does not take" in said


def test_an_answer_that_is_not_finite_is_an_error_of_that_image_alone(tmp_path: Path):
    api = served(checkpoint(tmp_path / "model", "dinov2"), None)
    images = [{"pixel_values": torch.full((1, 3, 32, 32), value)} for value in (0.0, float("nan"))]
    fine, broken = map(api.encode_response, api.predict(images))
    assert np.isfinite(fine["features"]).all()
    broken = pickle.loads(pickle.dumps(broken))  # on its way through LitServe's queue
    assert broken.status_code == 500 and json.loads(broken.body) == {
        "detail": "The model answers this image by NaN or infinity."
    }


def test_an_image_on_which_the_model_fails_is_an_error_of_that_image_alone(tmp_path: Path, capsys):
    api = served(checkpoint(tmp_path / "model", "dinov2"), None)
    images = [{"pixel_values": torch.randn(1, 3, 32, size)} for size in (32, 2, 32, 2)]  # of less than a patch
    answers = list(map(api.encode_response, api.predict(images)))
    for image, fine in zip(images[::2], answers[::2], strict=True):
        assert fine == api.encode_response(serve.run(api.model, image)[0])
    for broken in pickle.loads(pickle.dumps(answers[1::2])):
        assert broken.status_code == 500 and "fails on this image" in json.loads(broken.body)["detail"]
    assert capsys.readouterr().err.count("serve.py: the model failed on an image (") == 2


def test_images_that_are_too_large_together_are_answered_one_by_one(tmp_path: Path, monkeypatch, capsys):
    api = served(checkpoint(tmp_path / "model", "dinov2"), None)
    images = [{"pixel_values": torch.randn(1, 3, 32, 32)} for _ in range(3)]
    expected = [serve.run(api.model, image)[0] for image in images]
    run = serve.run

    def run_one(model, batch):
        if len(batch["pixel_values"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return run(model, batch)

    monkeypatch.setattr(serve, "run", run_one)
    for found, wanted in zip(api.predict(images), expected, strict=True):
        assert torch.equal(found, wanted)
    assert "serve.py" not in capsys.readouterr().err


def test_a_model_that_answers_nan_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny_model("dinov2")
    torch.nn.init.constant_(model.layernorm.weight, float("nan"))
    folder = checkpoint(tmp_path / "model", "dinov2")
    model.save_pretrained(folder)
    assert run_command("serve.py", lambda: serve.main([str(folder)])) == 2
    assert "answers a grey image by NaN or infinity" in capsys.readouterr().err


def test_an_image_that_becomes_far_larger_than_a_square_one_is_refused(tmp_path: Path):
    folder = checkpoint(tmp_path / "model", "dinov2")
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False)
    values = serve.require_every_shape(served(folder, None).model, processor)
    assert values == 3 * 32 * 32
    made = serve._process({"bytes": file(drawn(1, 40, 640)), "path": None}, processor, 16 * values)
    assert made["pixel_values"].shape == (1, 3, 32, 512)
    with pytest.raises(serve.UnreadableImage, match=r"becomes \(1, 3, 32, 544\); expected 49,152 values at most"):
        serve._process({"bytes": file(drawn(1, 40, 680)), "path": None}, processor, 16 * values)


def asked(bounded: serve.Bounded, *messages: dict[str, Any]) -> int:
    """The status by which a request is answered whose body comes in these pieces, and then nothing."""
    left, statuses = list(messages), []

    async def receive() -> dict[str, Any]:
        return left.pop(0) if left else await asyncio.sleep(SECONDS)

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status"))

    asyncio.run(bounded({"type": "http", "path": "/predict"}, receive, send))
    return statuses[0]


def test_a_body_that_does_not_come_gets_408_and_more_requests_than_may_be_held_503(monkeypatch):
    within: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            while (await receive())["more_body"]:
                pass
        except serve.HTTPException as error:
            assert error.headers == {"Connection": "close"}
            return await send({"status": error.status_code})
        with pytest.raises(asyncio.TimeoutError):  # once the body is whole, an answer may take its time
            await asyncio.wait_for(receive(), serve.SLOWEST + 0.3)
        with concurrent.futures.ThreadPoolExecutor(1) as other:
            within.append(other.submit(asked, bounded, {"more_body": False}).result())
        await send({"status": 200})

    bounded = serve.Bounded(app, most=1)
    for _ in range(2):  # what was held is let go
        monkeypatch.setattr(serve, "SLOWEST", 0.05)
        assert asked(bounded, {"more_body": True}) == 408
        monkeypatch.setattr(serve, "SLOWEST", 1)
        assert asked(bounded, {"more_body": True}, {"more_body": False}) == 200
    assert within == [503, 503]


@pytest.mark.parametrize("ends", [False, True])
def test_the_end_of_the_http_process_is_a_death_where_litserve_does_not_end_it(ends, monkeypatch):
    signals: list[Any] = []
    monkeypatch.setattr(serve, "GRACE", 0)
    monkeypatch.setattr(serve.os, "kill", lambda *given: signals.append(given))
    server = serve.Server.__new__(serve.Server)
    server.ends = ends
    read, write = os.pipe()
    os.close(write)  # as of a process that has ended
    server._end_with([SimpleNamespace(sentinel=read, name="LitServer-0")])
    os.close(read)
    assert signals == ([] if ends else [(os.getpid(), signal.SIGTERM)])
    assert server.died == (None if ends else "LitServer-0, which answers requests,")


def test_processes_that_answer_http_are_watched_and_threads_as_on_windows_are_not(monkeypatch):
    watched: queue.Queue[Any] = queue.Queue()
    monkeypatch.setattr(serve.Server, "_end_with", lambda self, of: watched.put(of))
    thread, process = threading.Thread(), SimpleNamespace(sentinel=0)
    for started in (thread, process):
        monkeypatch.setattr(serve.litserve.LitServer, "_start_server", lambda *given, of=started: {0: of})
        assert serve.Server.__new__(serve.Server)._start_server() == {0: started}
    assert watched.get(timeout=10) == [process] and watched.empty()


def test_a_dead_worker_is_told_and_workers_that_end_with_the_others_are_not(monkeypatch):
    monkeypatch.setattr(serve.litserve.LitServer, "_perform_graceful_shutdown", lambda *given: None)
    ignored: list[Any] = []
    monkeypatch.setattr(serve.signal, "signal", lambda *given: ignored.append(given))
    server = serve.Server.__new__(serve.Server)
    server._perform_graceful_shutdown(None, {}, "Worker inference_0 died")
    assert server.uvicorn_graceful_timeout == 5  # LitServe's 30 seconds for an answer that cannot come
    assert server.died == "A worker" and ignored == [(signal.SIGTERM, signal.SIG_IGN)]
    server = serve.Server.__new__(serve.Server)
    for reason in ("keyboard_interrupt", "Worker inference_0 died"):
        server._perform_graceful_shutdown(None, {}, reason)
    assert server.died is None


def test_load_sends_photographs_and_tells_speed_and_wrong_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], server: Running, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "images").mkdir()
    for seed in range(5):
        drawn(seed).save(tmp_path / "images" / f"{seed}.png")
    folder = checkpoint(tmp_path / "model", "vit-classifier")
    monkeypatch.setattr(load, "WARM_UP", 0.2)
    monkeypatch.setattr(
        load, "serving", lambda *given: contextlib.nullcontext(load.Server(url(server), server.process))
    )
    given = ["--model", str(folder), "--images", str(tmp_path / "images"), "--vwt", json.dumps(SETTING)]
    load.main([*given, "--clients", "1", "4", "--seconds", "2", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    # Both are the compressed server here, and so what is asked of the plain one comes out wrong.
    assert [(row["setting"], row["clients"]) for row in rows[:2]] == [("uncompressed", 1), ("uncompressed", 4)]
    assert all(row["wrong"] == row["answers"] > 0 and row["ratio"] == 1 for row in rows[:2])
    assert all(row["wrong"] == row["errors"] == 0 and row["answers"] > 0 for row in rows[2:])
    assert 10 < rows[2]["tokens"] < 60 and rows[3]["batch"] > rows[2]["batch"] == 1
    assert "| local, tolerance 0.1 | 4 |" in capsys.readouterr().out


def url(server: Running) -> str:
    return f"http://127.0.0.1:{server.port}"


def test_answers_are_judged_by_label_and_score():
    expected = {"labels": [{"label": "cat", "score": 0.50002}, {"label": "dog", "score": 0.49998}]}
    swapped = {"labels": [{"label": "dog", "score": 0.50001}, {"label": "cat", "score": 0.49999}]}
    far = {"labels": [{"label": "cat", "score": 0.6}, {"label": "dog", "score": 0.4}]}
    other = {"labels": [{"label": "dog", "score": 0.6}, {"label": "cat", "score": 0.4}]}
    assert load.judged(expected, expected, 1e-4) == "right"
    assert load.judged(swapped, expected, 1e-4) == "tie"
    assert load.judged(far, expected, 1e-4) == load.judged(other, far, 1e-4) == "wrong"
    assert load.judged("refused", expected, 1e-4) == load.judged({"detail": ""}, expected, 1e-4) == "error"
    assert load.judged({"features": [3.0, 4.001]}, {"features": [3.0, 4.0]}, 1e-3) == "right"
    assert load.judged({"features": [3.0, 4.1]}, {"features": [3.0, 4.0]}, 1e-3) == "wrong"


def test_a_server_whose_http_process_is_killed_ends_and_says_so(server: Running):
    """The last of this file: it ends the server of the others."""
    others = server.process.children(recursive=True)
    max(server.process.children(), key=psutil.Process.create_time).kill()
    assert server.process.wait(SECONDS) == 2
    assert not psutil.wait_procs(others, timeout=SECONDS)[1]
    assert "LitServer-0, which answers requests, ended by itself" in server.log.read_text()
