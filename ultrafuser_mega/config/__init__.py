"""The configuration tree of a run."""

from ultrafuser_mega.config.config import *  # noqa
