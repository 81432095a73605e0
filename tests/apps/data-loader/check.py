"""A data loader: forked workers, a memory-mapped file in the writable layer, batches in flight in pipes."""

from __future__ import annotations

from ask import Ask

TITLE = "data loader, forked workers, np.memmap"
FAST = False


def check(app: Ask) -> object:
    tokens = set()
    for index in range(10, 100):
        batch = app.json("/next")
        tokens.add(batch["token"])
        assert batch["index"] == index, "batches go on in order, none lost and none twice"
        assert batch["sum"] == 64 * sum(range(index * 500, (index + 1) * 500))
    assert len(tokens) == 1
    return tokens.pop()
