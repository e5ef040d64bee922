"""Settings of the whole test suite."""

from hypothesis import settings

# The same examples on every run and no time limit for one: a slow machine is no failure.
settings.register_profile("qdq", deadline=None, derandomize=True)
settings.load_profile("qdq")
