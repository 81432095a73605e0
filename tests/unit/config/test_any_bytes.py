"""Whatever a file holds, the answer is a configuration or a ConfigError."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from relume.config import load_app, load_node
from relume.config.app import AppFile, PartnerRuntime
from relume.config.keys import leaves
from relume.config.warning import dotted
from relume.errors import ConfigError

KEYS = [".".join(path) for path, _ in leaves(AppFile)]
KEYS += [f"cerebrium.runtime.rime.{path[0]}" for path, _ in leaves(PartnerRuntime)]
KEYS += [
    "cerebrium",
    "relume",
    "cerebrium.hardware",
    "cerebrium.runtime.custom",
    "cerebrium.pip.dependancies",
]

WRITTEN = st.sampled_from(
    ["1", "-1", "0", "1.5", "nan", "inf", "true", '""', '"a"', '"3.11"', "3.10", "[]", '["a"]', "[[1], {}]", "{}",
     '{a = "1"}', "1979-05-27", "07:32:00", "0x_1", "9" * 400, '"\\u0000"', '"CPU"', '["CPU", "TRN1"]', "1e400"]
)  # fmt: skip
LINES = st.lists(
    st.tuples(st.sampled_from(KEYS), WRITTEN).map(lambda pair: f"{pair[0]} = {pair[1]}"), max_size=8
)


def answer(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "cerebrium.toml")
        path.write_bytes(raw)
        for read in (lambda: load_app(path.parent), lambda: load_node(path)):
            try:
                config = read()
            except ConfigError as error:
                assert error.message
                assert all(character.isprintable() or character == "\n" for character in error.message)
            else:
                assert all(str(warning).isprintable() for warning in config.warnings)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300))
def test_arbitrary_bytes(raw: bytes) -> None:
    answer(raw)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=200))
def test_arbitrary_text_after_a_good_beginning(text: str) -> None:
    answer(b'[cerebrium.deployment]\nname = "a"\n' + text.encode("utf-8", "surrogatepass"))


@settings(deadline=None, max_examples=300)
@given(LINES)
def test_known_keys_with_values_of_any_type(lines: list[str]) -> None:
    answer("\n".join(['cerebrium.deployment.name = "a"', *lines]).encode())


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=4))
def test_keys_are_shown_printable(parts: list[str]) -> None:
    assert dotted(tuple(parts)).isprintable()
