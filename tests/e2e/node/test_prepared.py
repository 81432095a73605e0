"""Prepared instances: restored ahead of need, one signal away from their first answer."""

from __future__ import annotations

import time
from typing import Any

from harness import SNIPPET, App, Relume, get, until

PREPARED = "[relume.checkpoint]\nprepared = 1\n"


def prepared(relume: Relume, app: App) -> list[dict[str, Any]]:
    return [row for row in relume.ps(app.name) if row["state"] == "prepared"]


def test_a_start_takes_a_prepared_instance(relume: Relume, app: App) -> None:
    app.write(
        f"""
TICKS = []
def tick():
    while True:
        TICKS.append(time.monotonic())
        time.sleep(0.05)
threading.Thread(target=tick, daemon=True).start()
import subprocess
stopped = subprocess.Popen(["sleep", "1000"])
os.kill(stopped.pid, 19)
time.sleep(0.3)
ACTIONS["child"] = lambda _: open(f"/proc/{{stopped.pid}}/stat").read().split(")")[1].split()[0]
ACTIONS["ticks"] = lambda _: len(TICKS) - UNTIL
{SNIPPET}
UNTIL = len(TICKS)
serve()
""",
        extra=PREPARED,
    )
    relume.deploy(app.directory)
    first = relume.start(app.name, "--env", "COLOUR=red")
    (waiting,) = until(lambda: prepared(relume, app), what="nothing was prepared")
    time.sleep(2)
    began = time.monotonic()
    taken = relume.start(app.name, "--env", "COLOUR=blue")
    assert taken["instance_id"] == waiting["instance_id"]
    assert taken["restored"]
    assert taken["memory"] == "prepared"
    assert relume.logs(taken["instance_id"]).startswith(
        "CEREBRIUM_RESTORED: container restored from checkpoint\nRESTORED\n"
    )
    assert get(taken, "/env")["COLOUR"] == "blue"
    ticks = get(taken, "/ticks")
    assert ticks <= (time.monotonic() - began) / 0.05 + 2, "it stood still while it was prepared"
    assert get(taken, "/child") == "T", "what was stopped in the image stays stopped"
    assert get(first, "/child") == "T"
    assert "resumed" in taken["trace"] and not {"layer", "keeper", "runc_started"} & set(taken["trace"])

    learned = relume.state / "checkpoints" / taken["checkpoint_id"] / "working-set"
    until(learned.exists, what="nothing was learned of what it needed once it ran")
    (another,) = until(lambda: prepared(relume, app), what="no other was prepared behind it")
    assert another["instance_id"] != waiting["instance_id"]
    relume.run("stop", app.name)
    assert prepared(relume, app) == []
    time.sleep(2)
    assert prepared(relume, app) == [], "a stopped app has nothing prepared"


def test_it_gives_way_to_a_new_build_and_to_age(relume: Relume, app: App) -> None:
    app.write(f"{SNIPPET}\nserve()", extra=PREPARED + "prepared_max_age_s = 2\n")
    relume.deploy(app.directory)
    relume.start(app.name)
    (old,) = until(lambda: prepared(relume, app))
    until(lambda: [row for row in prepared(relume, app) if row["instance_id"] != old["instance_id"]])
    app.write(f"VERSION = 2\n{SNIPPET}\nserve()", extra=PREPARED)
    build = relume.deploy(app.directory)["build_id"]
    until(lambda: prepared(relume, app) == [], what="one of the old build waits")
    relume.start(app.name)
    (new,) = until(lambda: prepared(relume, app))
    assert new["build_id"] == build


def test_a_node_that_is_killed_with_one_waiting(second: Relume, app: App) -> None:
    """Nobody knows whether its environment is today's: the next run of the node clears it and makes another."""
    app.write(f"{SNIPPET}\nserve()", extra=PREPARED)
    second.start_node()
    second.deploy(app.directory)
    first = second.start(app.name)
    (old,) = until(lambda: prepared(second, app))
    second.kill_node()
    second.start_node()
    assert old["instance_id"] not in {row["instance_id"] for row in second.json("ps")}
    (new,) = until(lambda: prepared(second, app), what="nothing was prepared after the restart")
    taken = second.start(app.name)
    assert (taken["instance_id"], taken["memory"]) == (new["instance_id"], "prepared")
    assert get(taken, "/env") and get(first, "/env")
