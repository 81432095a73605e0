"""What a checkpoint can be restored on, and in which words it cannot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relume.checkpoint import platform
from relume.checkpoint.platform import Platform, differences

TAKEN = Platform("x86_64", ("aes", "avx", "avx2"), "6.12.0", "4.2.1", "1.1.5", ("H100 565.57",))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch": "aarch64"}, "architecture: taken on x86_64, here aarch64"),
        ({"kernel": "6.1.0"}, "kernel: taken on 6.12.0, here 6.1.0"),
        ({"criu": "4.1"}, "CRIU: taken on 4.2.1, here 4.1"),
        ({"runc": "1.3.0"}, "runc: taken on 1.1.5, here 1.3.0"),
        ({"cgroups": "v2"}, "cgroups: taken on v1, here v2"),
        ({"cpu": ("aes",)}, "CPU: lacks avx, avx2"),
        ({"gpu": ()}, "GPU: taken on H100 565.57, here none"),
        ({"gpu": ("A10 565.57",)}, "GPU: taken on H100 565.57, here A10 565.57"),
    ],
)
def test_each_difference_in_words(change: dict[str, Any], words: str) -> None:
    here = dataclasses.replace(TAKEN, **change)
    assert differences(TAKEN, here) == [words]
    assert here.key != TAKEN.key


def test_all_differences_are_told() -> None:
    assert len(differences(TAKEN, Platform("aarch64", (), "1", "2", "3"))) == 6


def test_a_cpu_that_has_more_will_do() -> None:
    """But not the other way round: what ran on it may have chosen code for it."""
    newer = dataclasses.replace(TAKEN, cpu=("aes", "avx", "avx2", "avx512f"))
    assert differences(TAKEN, newer) == []
    assert differences(newer, TAKEN) == ["CPU: lacks avx512f"]


names = st.text(max_size=8)


@given(
    st.builds(
        Platform,
        names,
        st.lists(names).map(lambda cpu: tuple(sorted(cpu))),
        names,
        names,
        names,
        st.lists(names).map(tuple),
    )
)
def test_through_json_and_back(here: Platform) -> None:
    again = Platform.from_json(json.loads(json.dumps(dataclasses.asdict(here))))
    assert again == here
    assert again.key == here.key
    assert differences(here, again) == []


def test_features_are_those_that_programs_choose_by(tmp_path: Path) -> None:
    """The mitigations and the power states in the kernel's list differ between boots and mean nothing here."""
    source = tmp_path / "cpuinfo"
    source.write_text(
        "processor\t: 0\nflags\t\t: fpu sse2 avx2 ibrs_enhanced arat\n\nprocessor\t: 1\nflags: avx512f\n"
    )
    assert platform.cpu_features(source) == ("avx2", "sse2")
    arm = tmp_path / "arm"
    arm.write_text("BogoMIPS\t: 243.75\nFeatures\t: fp asimd crc32 atomics\n")
    assert platform.cpu_features(arm) == ("asimd", "atomics", "crc32")


def test_this_machine() -> None:
    here = platform.here(criu="4.2.1", runc="1.1.5")
    assert here.cpu and here.kernel and here.arch
    assert here.key == platform.here(criu="4.2.1", runc="1.1.5").key
