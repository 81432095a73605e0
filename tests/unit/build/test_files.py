"""Which files of an app's directory belong to a build, and how they get there."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relume.build import files, tree
from relume.errors import BuildError

DEFAULT_INCLUDE = ["./*", "main.py", "cerebrium.toml"]
DEFAULT_EXCLUDE = [".*"]


@pytest.fixture
def app(tmp_path: Path) -> Path:
    root = tmp_path / "app"
    for name in (
        "main.py",
        "cerebrium.toml",
        "sub/main.py",
        "sub/deep/data.bin",
        ".git/config",
        "sub/.env",
        "a.log",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (root / "sub/empty").mkdir()
    (root / "sub/__pycache__").mkdir()
    (root / "sub/__pycache__/main.cpython-311.pyc").write_bytes(b"old")
    return root


def found(
    root: Path, include: list[str] = DEFAULT_INCLUDE, exclude: list[str] = DEFAULT_EXCLUDE
) -> list[str]:
    return [entry.path for entry in files.scan(root, include, exclude).entries]


def test_the_defaults_are_the_whole_directory_without_what_is_hidden(app: Path) -> None:
    assert found(app) == [
        *("a.log", "main.py", "sub", "sub/deep", "sub/deep/data.bin", "sub/empty", "sub/main.py"),
    ]


@pytest.mark.parametrize("include", [["*"], ["./*"], ["."], ["./"], ["**"], ["**/*"], ["*", "main.py"]])
def test_ways_to_say_everything(app: Path, include: list[str]) -> None:
    assert found(app, include) == found(app)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["main.py"], [], ["main.py", "sub", "sub/main.py"]),
        (["./main.py"], [], ["main.py"]),
        (["sub/deep"], [], ["sub", "sub/deep", "sub/deep/data.bin"]),
        (["sub/*.py"], [], ["sub", "sub/main.py"]),
        (["sub/**/*.bin"], [], ["sub", "sub/deep", "sub/deep/data.bin"]),
        (["*.bin"], [], ["sub", "sub/deep", "sub/deep/data.bin"]),
        (["*"], ["sub", ".*"], ["a.log", "main.py"]),
        (["*"], ["sub/", ".*"], ["a.log", "main.py"]),
        (["*"], ["./sub/*", ".*"], ["a.log", "main.py", "sub"]),
        (["*"], ["*.log", "deep", ".*"], ["main.py", "sub", "sub/empty", "sub/main.py"]),
        (["[am]*"], [".*"], ["a.log", "main.py", "sub", "sub/main.py"]),
        (["[!a]*.py"], [], ["main.py", "sub", "sub/main.py"]),
        (["[!]", "[^]a", "[]"], [], []),
        (["nothing"], [], []),
    ],
)
def test_patterns(app: Path, include: list[str], exclude: list[str], expected: list[str]) -> None:
    assert found(app, include, exclude) == expected


@given(st.lists(st.text(max_size=12), max_size=4), st.text("ab/.*?[]!\\", min_size=1, max_size=12))
def test_any_pattern_compiles_and_matches_itself_when_plain(patterns: list[str], more: str) -> None:
    compiled = files.Patterns([*patterns, more])
    compiled.match("a/b")
    plain = "".join(letter for letter in more if letter in "ab")
    if plain:
        assert files.Patterns([plain]).match(plain)


@pytest.mark.parametrize("pattern", ["[z-a]*", "./src/[z-a]"])
def test_a_pattern_that_means_nothing_is_named(app: Path, pattern: str) -> None:
    for include, exclude in (["*", pattern], []), (["*"], [pattern]):
        with pytest.raises(BuildError, match=r"\[z-a\].* is no pattern of files: bad character range z-a"):
            found(app, include, exclude)


@pytest.mark.parametrize("pattern", ["[[a].py", "[a&&m]*.py", "[a||m]*.py", "[a~~m]*.py"])
def test_a_set_has_no_operators(pattern: str) -> None:
    """Python's `re` warns that these may mean more one day; a warning is an error here."""
    assert files.Patterns([pattern]).match("a.py")


def test_the_digest_is_of_content_and_modes_alone(app: Path, tmp_path: Path) -> None:
    before = files.scan(app, DEFAULT_INCLUDE, DEFAULT_EXCLUDE)
    moved = app.rename(tmp_path / "elsewhere")
    for path in moved.rglob("*"):
        os.utime(path, (1, 1))
    (moved / "cerebrium.toml").write_text("# another comment")
    (moved / ".git/config").write_text("other")
    assert files.scan(moved, DEFAULT_INCLUDE, DEFAULT_EXCLUDE).digest == before.digest
    (moved / "main.py").chmod(0o755)
    assert files.scan(moved, DEFAULT_INCLUDE, DEFAULT_EXCLUDE).digest != before.digest


def test_another_name_for_the_configuration(app: Path) -> None:
    scanned = files.scan(app, ["./*"], [".*"], config_name="main.py")
    assert [entry.path for entry in scanned.entries][:3] == ["a.log", "cerebrium.toml", "sub"]


def test_the_copy_is_exact_and_its_times_are_of_its_content(app: Path, tmp_path: Path) -> None:
    (app / "run").write_text("x")
    (app / "run").chmod(0o751)
    (app / "sub/up").symlink_to("../main.py")
    (app / "sub/deep").chmod(0o555)
    scanned = files.scan(app, DEFAULT_INCLUDE, DEFAULT_EXCLUDE)
    target = tmp_path / "target"
    target.mkdir()
    scanned.copy(target)
    assert files.scan(target, ["*"], []).digest == scanned.digest
    run = target / "run"
    assert run.stat().st_mode & 0o7777 == 0o751
    assert run.stat().st_mtime == tree.content_time(tree.hash_file(run))
    (target / "sub/deep").chmod(0o755)


def test_a_file_that_changes_meanwhile_is_refused(app: Path, tmp_path: Path) -> None:
    scanned = files.scan(app, DEFAULT_INCLUDE, DEFAULT_EXCLUDE)
    (app / "main.py").write_text("newer")
    with pytest.raises(BuildError, match=r"main\.py changed"):
        scanned.copy(_empty(tmp_path / "one"))
    (app / "main.py").unlink()
    with pytest.raises(BuildError, match=r"main\.py changed"):
        scanned.copy(_empty(tmp_path / "two"))
    (app / "main.py").symlink_to("/etc/shadow")
    with pytest.raises(BuildError, match=r"main\.py changed"):
        scanned.copy(_empty(tmp_path / "three"))


def _empty(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("target", ["/etc/passwd", "../../outside", "sub/../../outside", ".."])
def test_links_that_lead_out_are_refused(app: Path, target: str) -> None:
    (app / "link").symlink_to(target)
    with pytest.raises(BuildError, match=r"link links to .* outside"):
        found(app)
    assert "link" not in found(app, exclude=[".*", "link"])


def test_a_link_through_a_link_that_leads_out_is_refused(app: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").touch()
    (app / ".hidden").symlink_to(tmp_path / "outside")
    (app / "link").symlink_to(".hidden/secret")
    with pytest.raises(BuildError, match="outside"):
        found(app)


@pytest.mark.parametrize("target", ["main.py", "sub/../main.py", "not-there", "sub", "loop"])
def test_links_inside_are_kept(app: Path, target: str) -> None:
    (app / "loop").symlink_to(target)
    assert "loop" in found(app)


def test_special_files_are_refused(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(app / "pipe")
    with pytest.raises(BuildError, match="pipe is a FIFO"):
        found(app)
    (app / "pipe").unlink()
    monkeypatch.chdir(app)  # a socket's path may be no longer than 107 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("sock")
        with pytest.raises(BuildError, match="sock is a socket"):
            found(app)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be read"):
        found(tmp_path / "nowhere")
