from support.triton_workers import *  # noqa: F403  fixtures
