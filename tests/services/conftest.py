"""Property tests here try the same examples in every run, and no clock can fail them."""

from hypothesis import settings

settings.register_profile("services", deadline=None, derandomize=True)
settings.load_profile("services")
