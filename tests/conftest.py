"""For all tests: a property holds or not; how long an example takes on a busy machine says nothing about that."""

from hypothesis import settings

settings.register_profile("relume", deadline=None)
settings.load_profile("relume")
