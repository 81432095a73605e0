"""Apps of ours that claim to carry a published snippet unchanged do carry it, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# From the published page on checkpointing, its vLLM example: from "# Trigger checkpoint" to "pass".
VLLM = """\
# Trigger checkpoint
try:
    import json
    req = urllib.request.Request("http://169.254.169.253:8234/checkpoint", method="POST")
    with urllib.request.urlopen(req, timeout=300) as response:
        result = response.read()
        print(json.loads(result))
except http.client.RemoteDisconnected:
    # TCP connections disconnect on restore and throw remote
    pass
"""

# From the published examples of apps with functions.
EXAMPLE = """\
try:
    req = urllib.request.Request("http://169.254.169.253:8234/checkpoint", method="POST")
    urllib.request.urlopen(req)
    print("Checkpointed successfully")
except http.client.RemoteDisconnected:
    # TCP connections disconnect on restore and throw remote
    pass
"""


@pytest.mark.parametrize(
    ("file", "snippet"), [("bench/vllm-cpu/main.py", VLLM), ("tests/apps/functions/main.py", EXAMPLE)]
)
def test_the_snippet_is_there_unchanged(file: str, snippet: str) -> None:
    assert f"\n{snippet}" in (ROOT / file).read_text()
