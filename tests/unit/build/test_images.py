"""OCI images, Dockerfiles, and how bases are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relume.build import base, dockerfile, image
from relume.build.image import ImageConfig
from relume.errors import BuildError


def layout(root: Path, *tags: str) -> Path:
    """An OCI layout with an image for each tag, without layers."""
    entries = []
    for number, tag in enumerate(tags):
        config = {
            "config": {"Env": [f"TAG={tag}", "A=b=c"], "Cmd": ["run"], "User": "app", "Entrypoint": None}
        }
        manifest = {"config": {"digest": _blob(root, f"c{number}", config)}, "layers": []}
        digest = _blob(root, f"m{number}", manifest)
        entries.append({"digest": digest, "annotations": {"org.opencontainers.image.ref.name": tag}})
    (root / "index.json").write_text(json.dumps({"manifests": entries}))
    return root


def _blob(root: Path, name: str, data: object) -> str:
    path = root / "blobs/sha256" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return f"sha256:{name}"


def test_an_images_config(tmp_path: Path) -> None:
    digest, config = image.read_config(layout(tmp_path / "image", "one", "two"), "two")
    assert digest == "sha256:m1"
    assert config == ImageConfig(env={"TAG": "two", "A": "b=c"}, cmd=("run",), user="app")
    assert ImageConfig.from_dict(config.as_dict()) == config
    assert ImageConfig.from_dict({}) == ImageConfig()


def test_tags(tmp_path: Path) -> None:
    one, two = layout(tmp_path / "one", "only"), layout(tmp_path / "two", "a", "b")
    assert image.manifest_digest(one, None) == "sha256:m0"
    for tag in (None, "c"):
        with pytest.raises(BuildError, match="it has: a, b"):
            image.manifest_digest(two, tag)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"manifests": 3}'])
def test_layouts_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(BuildError):
        image.manifest_digest(tmp_path, "tag")


def test_a_digest_is_no_path(tmp_path: Path) -> None:
    root = layout(tmp_path / "image", "one")
    (root / "blobs/sha256/m0").write_text(json.dumps({"config": {"digest": "sha256:../../../etc/passwd"}}))
    with pytest.raises(BuildError, match="bad digest"):
        image.read_config(root, "one")


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", "0:0"),
        ("app", "1000:1001"),
        ("1000", "1000:1001"),
        ("7", "7:0"),
        ("app:web", "1000:33"),
        ("5:6", "5:6"),
    ],
)
def test_users(tmp_path: Path, user: str, expected: str) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n"
    )
    (tmp_path / "etc/group").write_text("web:x:33:\n")
    assert image.find_user(tmp_path, user) == expected
    assert image.find_home(tmp_path, "1000:1001") == "/home/app"
    assert image.find_home(tmp_path, "77:0") == "/"


@pytest.mark.parametrize("user", ["nobody", "0:nogroup"])
def test_users_that_are_not_there(tmp_path: Path, user: str) -> None:
    with pytest.raises(BuildError, match="does not have"):
        image.find_user(tmp_path, user)


def test_a_passwd_file_that_leads_out_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").symlink_to("/etc/passwd")
    with pytest.raises(BuildError):
        image.find_user(tmp_path, "daemon")


async def test_bases_in_files_are_known_by_their_content(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for app in (here, there):
        layout(app / "image", "tag")
        (app / "saved.tar").write_bytes(b"archive")
    for written in (
        "oci:image:tag",
        "oci:image",
        "docker-archive:saved.tar",
        "docker-archive:saved.tar:name:tag",
    ):
        one, other = await base.identify(written, here), await base.identify(written, there)
        assert one.identity == other.identity
        assert one.reference != other.reference
    (there / "saved.tar").write_bytes(b"other")
    name = "docker-archive:saved.tar"
    assert (await base.identify(name, here)).identity != (await base.identify(name, there)).identity


async def test_bases_of_registries(tmp_path: Path) -> None:
    one = await base.identify("docker://debian:bookworm-slim", tmp_path)
    other = await base.identify("debian:bookworm-slim", tmp_path)
    assert one.identity == other.identity
    assert other.transport == "registry"


@pytest.mark.parametrize(
    "written", ["oci:missing", "oci:missing:tag", "docker-archive:missing.tar", "oci:/nowhere:a"]
)
async def test_bases_that_are_not_there(tmp_path: Path, written: str) -> None:
    with pytest.raises(BuildError, match="no such"):
        await base.identify(written, tmp_path)


def test_arguments_after_every_from() -> None:
    text = "ARG V=1\nFROM --platform=linux/amd64 debian:12 AS one\nRUN true\nfrom one"
    assert dockerfile.with_arguments(text, ["A", "B"]) == (
        "ARG V=1\nFROM --platform=linux/amd64 debian:12 AS one\nARG A\nARG B\nRUN true\nfrom one\nARG A\nARG B\n"
    )


def test_mount_points_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("opt/wheels", "etc/xdg/pip", "run/support", "srv/data"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "etc/pip.conf").touch()
    (tmp_path / "etc/hosts").write_text("127.0.0.1 localhost\n")
    (tmp_path / "srv/data/file").touch()
    dockerfile.remove_mount_points(
        tmp_path, ["/opt/wheels", "/etc/pip.conf", "/etc/xdg/pip", "/run/support", "/srv/data", "/not/there"]
    )
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["etc", "etc/hosts", "opt", "run", "srv", "srv/data", "srv/data/file"]
