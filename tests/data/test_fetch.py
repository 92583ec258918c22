"""Fetching, from a server of our own that breaks off, lies and forgets."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from mmphi.cli import main
from mmphi.data import fetch
from mmphi.errors import DataError, ModelError


class Server(ThreadingHTTPServer):
    """Files by their path, and what is wrong with some of them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.breaks: dict[str, int] = {}  # Bytes after which the first answer breaks off.
        self.digests: dict[str, str] = {}
        self.ranges: list[tuple[str, str]] = []
        self.deaf: set[str] = set()  # Knows no ranges.

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        asked = self.headers.get("Range", "")
        self.server.ranges.append((self.path, asked))
        begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.path not in self.server.deaf else 0
        if begin > len(content):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        if self.path in self.server.digests:
            self.send_header("X-Linked-Etag", f'"{self.server.digests[self.path]}"')
        self.end_headers()
        end = self.server.breaks.pop(self.path, len(content))
        self.wfile.write(content[begin:end])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "PAUSE_S", 0.0)
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 0, 0)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("deaf", [False, True])
def test_what_breaks_off_is_gone_on_from(server: Server, tmp_path: Path, deaf: bool) -> None:
    content = bytes(range(256)) * 400
    server.files["/a"], server.breaks["/a"] = content, 50_000
    server.deaf = {"/a"} if deaf else set()
    fetch.download(f"{server.address}/a", tmp_path / "in" / "a")
    assert (tmp_path / "in" / "a").read_bytes() == content
    assert [asked for _, asked in server.ranges] == ["", "bytes=50000-"]
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["a"]


def test_part_of_another_file_is_begun_anew(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = b"short"
    (tmp_path / "a.part").write_bytes(b"much longer than that")
    fetch.download(f"{server.address}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"short"


def test_content_is_checked_against_its_digest(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = b"good"
    server.digests["/a"] = hashlib.sha256(b"good").hexdigest()
    fetch.download(f"{server.address}/a", tmp_path / "a")
    server.digests["/a"] = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(DataError, match="the checksum differs"):
        fetch.download(f"{server.address}/a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_missing_file_and_server_are_told(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="404"):
        fetch.download(f"{server.address}/none", tmp_path / "a")
    address = server.address
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match="cannot be fetched") as caught:
        fetch.download(f"{address}/a", tmp_path / "a")
    assert "resumes from there" in caught.value.hint


def test_llava_with_its_images_as_the_command_fetches_them(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a thing"}]
    names = [f"{i:012d}.jpg" for i in range(5)]
    rows = [{"id": n, "image": n, "conversations": turns} for n in [*names, names[0]]]
    server.files["/llava_instruct_150k.json"] = json.dumps([*rows, {"id": "text", "conversations": turns}]).encode()
    server.files.update({f"/train2017/{name}": picture(40 * i) for i, name in enumerate(names)})
    server.files[f"/train2017/{names[4]}"] = b"<html>no picture</html>"
    del server.files[f"/train2017/{names[3]}"]
    server.breaks["/llava_instruct_150k.json"] = 100
    command = ["fetch", "llava", str(tmp_path / "data"), "--instruct-url", server.address]
    command += ["--images-url", f"{server.address}/train2017", "--workers", "2"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "2 of 5 images could not be fetched" in error
    assert "run the same command again" in error
    assert sorted(p.name for p in (tmp_path / "data" / "train2017").iterdir()) == names[:3]
    server.files.update({f"/train2017/{name}": picture(9) for name in names[3:]})
    server.ranges.clear()
    assert main(command) == 0
    assert {path for path, _ in server.ranges} == {f"/train2017/{name}" for name in names[3:]}
    assert f"export MMPHI_LLAVA={tmp_path / 'data'}" in capsys.readouterr().out
    assert main([*command, "--max-images", "2"]) == 0


def test_models_that_are_missing_are_named_where_no_hub_is(tmp_path: Path) -> None:
    (tmp_path / "all-minilm-l6-v2").mkdir()
    with pytest.raises(ModelError, match="the hub is unreachable") as caught:
        fetch.fetch_models(tmp_path)
    assert "smollm2-135m-instruct, efficientnet-lite0.safetensors" in caught.value.what
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in caught.value.hint
