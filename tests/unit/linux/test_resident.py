"""Files kept in memory, seen through a process of its own: it must not keep this one's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from relume.linux import resident


def test_a_program_comes_with_its_libraries() -> None:
    found = resident.programs(["sh", "relume-has-no-such-program"])
    assert any("libc" in path.name for path in found)
    assert all(path.is_file() and not path.is_symlink() for path in found)
    assert len(found) == len(set(found))


def test_what_is_held_is_locked(tmp_path: Path) -> None:
    (tmp_path / "held").write_bytes(b"x" * (1 << 16))
    program = (
        "import sys; from pathlib import Path; from relume.linux import resident\n"
        "print(resident.hold(map(Path, sys.argv[1:])))\n"
        "print([line for line in open('/proc/self/status') if line.startswith('VmLck')][0].split()[1])"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "held"), str(tmp_path / "missing")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert said == [str(1 << 16), "64"]
