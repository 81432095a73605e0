"""The caching proxy of docs/region.md, as it stands there, between two nodes and a bucket."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from relume.cli.benchmark.server import free_port, running
from relume.store import (
    LocalCheckpoint,
    PageRun,
    Patience,
    Region,
    RegionConfig,
    new_key_file,
    read_from_files,
)
from store_servers import PASSWORD, USER, FaultProxy, localbucket, url

PAGE = (Path(__file__).parents[2] / "docs/region.md").read_text()
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A bucket that counts the requests which reach it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", USER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    with localbucket(tmp_path) as endpoint, FaultProxy(endpoint) as counting:
        yield counting


@pytest.fixture
def cached(bucket: FaultProxy, tmp_path: Path) -> Iterator[str]:
    """The endpoint of nginx with the sample's configuration, addresses and paths apart."""
    sample = PAGE.partition("<!-- nginx sample -->")[2].split("```")[1].removeprefix("nginx")
    port = free_port()
    sample = sample.replace("minio.internal:9000", bucket.endpoint.removeprefix("http://"))
    sample = sample.replace("listen 8080", f"listen 127.0.0.1:{port}").replace(
        "/var/cache/nginx", str(tmp_path)
    )
    sample = re.sub(r"max_size=\S+", "max_size=1g", sample)
    places = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off; user root; pid {tmp_path}/nginx.pid; error_log stderr;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{places}{sample}}}\n"
    )
    assert NGINX is not None, "script/bootstrap --dev installs it"
    with running([NGINX, "-p", str(tmp_path), "-c", str(config)], port, tmp_path / "nginx.log") as endpoint:
        yield endpoint


def test_the_second_node_reads_from_the_cache(cached: str, bucket: FaultProxy, tmp_path: Path) -> None:
    new_key_file(tmp_path / "key")

    def node(name: str) -> Region:
        patience = Patience(bound_s=10.0, request_s=5.0)
        return Region(RegionConfig(url(cached), tmp_path / "key", patience=patience), tmp_path / name, name)

    images = tmp_path / "images"
    images.mkdir()
    # No two pages alike, so no two chunks: one that is wrong in a cache is fetched as often as it is used.
    (images / "pages-1.img").write_bytes(b"".join(at.to_bytes(4, "big") * 1024 for at in range(1, 8001)))
    (images / "inventory.img").write_bytes(b"inventory")
    a = node("a")
    a.prove()
    with a.lease("app", "build", "platform").kept() as lease:
        manifest = a.publish(lease, LocalCheckpoint("app", "build", "platform", images))
    a.publish_working_set(manifest, [PageRun("pages-1.img", 1, 500)], read_from_files(images))

    def gets_at_the_bucket_of(name: str) -> int:
        before = len(bucket.requests)
        region = node(name)
        assert region.find("build", "platform") == manifest
        region.pull(manifest.name)
        fetched = region.fetch(manifest.name)
        assert (fetched.images / "pages-1.img").read_bytes() == (images / "pages-1.img").read_bytes()
        fetched.close()
        return sum(method == "GET" and "list-type" not in path for method, path in bucket.requests[before:])

    assert gets_at_the_bucket_of("b") > 5
    assert gets_at_the_bucket_of("c") == 0

    # A byte that went bad in the proxy's cache: the chunk is fetched again past it.
    chunk = a.objects.list("chunk")[0].name
    for path in (tmp_path / "relume").rglob("*"):
        if path.is_file() and chunk.encode() in path.read_bytes():
            data = bytearray(path.read_bytes())
            data[-20] ^= 1
            path.write_bytes(data)
    assert gets_at_the_bucket_of("d") == 1
