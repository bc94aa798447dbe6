"""Data and checkpoints on an S3 server (moto's), with its own client: throttling, answers cut off, kills, two ranks.

Left out where the two are not installed: `pip install s3fs 'moto[server]'`.
"""

import http.client
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.e2e.conftest import _process_as_before, arguments, shared, train  # noqa: F401
from tests.e2e.harness import Command, Ended, command, end_two, records, start_two
from titan_moe.checkpoint import complete_steps, resolve_checkpoint
from titan_moe.checkpoint.verify import verify_checkpoint
from titan_moe.data import waves
from titan_moe.runtime import remote

pytest.importorskip("s3fs", reason="needs s3fs: pip install s3fs 'moto[server]'")
moto = pytest.importorskip("moto.server", reason="needs moto: pip install s3fs 'moto[server]'")
# The client's own tasks end after the test that began them; moto warns of what its own dependencies do.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.dist]

BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
URL = "s3://bucket/run"


class Proxy:
    """Stands before the server: answers a share of requests with 503, cuts off a share of others, notes them all."""

    def __init__(self, port: int) -> None:
        self.busy, self.cut, self.slow = 0.0, 0.0, ""
        self.requests: list[str] = []
        self.refused = 0
        draw, outer = random.Random(0), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.requests.append(f"{self.command} {self.path}")
                if outer.slow and outer.slow in f"{self.command} {self.path}":
                    time.sleep(3600)
                if draw.random() < outer.busy:
                    outer.refused += 1
                    return self.answer(503, [("Content-Type", "application/xml")], BUSY)
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                data = response.read()
                headers = [item for item in response.getheaders() if item[0].lower() not in LENGTHS]
                length = int(response.getheader("Content-Length") or 0) if self.command == "HEAD" else None
                if self.command == "GET" and len(data) > 1000 and draw.random() < outer.cut:
                    outer.refused += 1
                    length = len(data)
                    data = data[: length // 2]
                    self.close_connection = True
                return self.answer(response.status, headers, data, length)

            def answer(
                self, status: int, headers: list[tuple[str, str]], data: bytes, length: int | None = None
            ) -> None:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data) if length is None else length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


LENGTHS = {"content-length", "transfer-encoding", "connection", "server", "date"}


@pytest.fixture(scope="session")
def proxy() -> Iterator[Proxy]:
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    made = Proxy(server.get_host_and_port()[1])
    yield made
    made.server.shutdown()
    server.stop()


@pytest.fixture(autouse=True)
def store(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared: Path) -> Any:  # noqa: F811
    """An empty bucket but for a text, credentials and endpoint by the environment."""
    proxy.busy, proxy.cut, proxy.slow = 0.0, 0.0, ""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    environment = {
        "AWS_ACCESS_KEY_ID": "key-of-the-test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "XDG_CACHE_HOME": str(tmp_path / "user"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    type(fs).clear_instance_cache()
    if fs.exists("bucket"):
        fs.rm("bucket", recursive=True)
    fs.mkdir("bucket")
    fs.pipe_file("bucket/text.jsonl", (shared / "text.jsonl").read_bytes())
    proxy.requests.clear()
    return fs


def test_a_busy_store(proxy: Proxy, train: Callable[..., Ended], tmp_path: Path, monkeypatch: Any) -> None:  # noqa: F811
    """One request of seven is answered 503, one answer of four is cut off: the run is that from a disk."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", 10_000)
    assert train("whole").code == 0
    proxy.busy, proxy.cut = 0.15, 0.25
    there = {"checkpoint__folder": URL, "data__path": "s3://bucket/*.jsonl", "data__num_workers": 1}
    cache = {"data__cache_folder": str(tmp_path / "cache")}
    ended = train(**there, **cache)
    assert ended.code == 0, ended.err
    assert proxy.refused > 5
    for kind in ("train", "validation"):
        assert records(tmp_path / "run", kind) == records(tmp_path / "whole", kind)
    assert complete_steps(URL) == [2, 4, 6]
    assert verify_checkpoint([URL]) == 0

    # Nothing of the text is read again, and credentials are written nowhere.
    proxy.requests.clear()
    ended = train(**there, **cache, training__steps=7)
    assert ended.code == 0, ended.err
    assert not [line for line in proxy.requests if line.startswith("GET") and "text.jsonl" in line]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] + [ended.err.encode()]
    assert not [data for data in written if b"of-the-test" in data]


def test_many_objects_in_waves(store: Any, train: Callable[..., Ended], tmp_path: Path, monkeypatch: Any) -> None:  # noqa: F811
    monkeypatch.setattr(waves, "WAVE_BYTES", 20_000)
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(5):
        data = store.cat_file("bucket/text.jsonl").replace(b"cat", f"cat{number}".encode())
        (folder / f"{number}.jsonl").write_bytes(data)
        store.pipe_file(f"bucket/many/{number}.jsonl", data)
    cache = {"data__cache_folder": str(tmp_path / "cache")}
    assert train("whole", data__path=str(folder), **cache).code == 0
    cache = {"data__cache_folder": str(tmp_path / "other")}
    ended = train(data__path="s3://bucket/many", **cache)
    assert ended.code == 0, ended.err
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    store.pipe_file("bucket/many/2.jsonl", store.cat_file("bucket/many/1.jsonl"))
    ended = train(data__path="s3://bucket/many", training__steps=8, **cache)
    assert ended.code == 2
    assert "data.path (content)" in ended.err


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_killed_while_it_saves(
    proxy: Proxy,
    store: Any,
    arguments: Callable[..., list[str]],  # noqa: F811
    train: Callable[..., Ended],  # noqa: F811
    tmp_path: Path,
    mode: str,
) -> None:
    """kill -9 while the shards of a step are on their way: the step before is there, and the run goes on from it."""
    assert train("whole").code == 0
    there = {"checkpoint__folder": URL, "checkpoint__async_mode": mode}
    proxy.slow = "PUT /bucket/run/step-4/__0_0"
    run = Command("train", arguments(**there), tmp_path / "log")
    run.wait_for(lambda: any("PUT /bucket/run/step-4/__0_0" in line for line in proxy.requests))
    run.process.kill()
    run.end()
    proxy.slow = ""
    store.invalidate_cache()
    assert store.exists("bucket/run/step-4/.unfinished")
    assert complete_steps(URL) == [2]
    ended = train(**there)
    assert ended.code == 0, ended.err
    assert "/step-2" in ended.err
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    store.invalidate_cache()
    assert complete_steps(URL)[-1] == 6
    assert not [name for name in store.find("bucket/run") if name.endswith((".tmp", ".unfinished"))]


def test_killed_while_it_fetches(
    proxy: Proxy,
    arguments: Callable[..., list[str]],  # noqa: F811
    train: Callable[..., Ended],  # noqa: F811
    tmp_path: Path,
) -> None:
    """What had come of a file goes; the next start fetches it whole."""
    there = {"data__path": "s3://bucket/text.jsonl", "data__cache_folder": str(tmp_path / "cache")}
    assert train("whole").code == 0
    proxy.slow = "GET /bucket/text.jsonl"
    run = Command("train", arguments(**there), tmp_path / "log")
    run.wait_for(lambda: any(line.startswith(proxy.slow) for line in proxy.requests))
    run.process.kill()
    run.end()
    assert [path.suffix for path in (tmp_path / "cache" / "remote").rglob(".*")] == [".tmp"]
    proxy.slow = ""
    ended = train(**there)
    assert ended.code == 0, ended.err
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "cache" / "remote").rglob("*") if path.is_file()] == ["lock"]


def test_two_ranks_save_and_one_goes_on(
    arguments: Callable[..., list[str]],  # noqa: F811
    train: Callable[..., Ended],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Each rank sends its own shards; what two have saved two load, and one loads as well."""
    layout = {"parallelism__data_parallel_shard_degree": 2, "training__local_batch_size": 1, "checkpoint__folder": URL}
    ranks = start_two(arguments(**layout), tmp_path / "log")
    assert end_two(ranks) == [0, 0], ranks[0].written(".err")
    assert {"__0_0.distcp", "__1_0.distcp", "rank-1.pt"} <= {path.name for path in resolve_checkpoint(URL).iterdir()}
    ranks = start_two(arguments(training__steps=7, **layout), tmp_path / "log")
    assert end_two(ranks) == [0, 0], ranks[0].written(".err")
    ended = train(training__steps=8, checkpoint__folder=URL)
    assert ended.code == 0, ended.err
    assert complete_steps(URL) == [2, 4, 6, 7, 8]
    ended = command("evaluate", ["--checkpoint", URL, "--data.path", "s3://bucket/text.jsonl"])
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("s3://bucket/none.txt", r"data.path s3://bucket/none.txt: no such file, folder or bucket"),
        ("s3://none/text.txt", r"data.path s3://none/text.txt: no such file, folder or bucket \(The specified bucket"),
    ],
)
def test_mistakes_are_one_line(train: Callable[..., Ended], url: str, text: str) -> None:  # noqa: F811
    ended = train(data__path=url)
    assert ended.code == 2
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error")]
    assert re.match(f"error: {text}", line), line


def test_no_bucket_and_no_credentials(train: Callable[..., Ended], store: Any, monkeypatch: Any) -> None:  # noqa: F811
    ended = train(checkpoint__folder="s3://none/run")
    assert ended.code == 2
    assert "s3://none/run: no such file, folder or bucket (The specified bucket does not exist)" in ended.err
    assert not store.exists("none")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    type(store).clear_instance_cache()
    ended = train(data__path="s3://bucket/text.jsonl")
    assert ended.code == 2
    assert "error: data.path s3://bucket/text.jsonl: no credentials (Unable to locate credentials): set" in ended.err
    type(store).clear_instance_cache()
