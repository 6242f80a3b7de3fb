"""``python -m ultrafuser_mega``: the ``ultrafuser`` command, where it is not on the path."""

from ultrafuser_mega.cli import main

if __name__ == "__main__":
    main()
