from support.release_fixtures import *  # noqa: F403  fixtures
