"""scikit-learn with joblib's loky workers; numpy's global generator differs in every copy."""

from __future__ import annotations

from ask import Ask

TITLE = "scikit-learn, joblib loky workers"
FAST = False


def check(app: Ask) -> object:
    answer = app.json("/")
    assert answer["right"], "the forest predicts what it was fitted to"
    app.unique("numpy.random.random()", answer["draw"])
    # The workers of before the checkpoint do the work: same process ids in each instance.
    return [answer["token"], answer["workers"]]
