"""Which files an entry of the configuration means, and which format each is in.

An entry is a file, a folder of shards or a glob (``shards/part-*.jsonl.gz``). The format is what a file's first bytes
say, so a wrong extension does no harm; a file in a format that is not read is refused by name, since its lines would
otherwise pass for malformed rows.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import json
import zlib
from enum import Enum
from pathlib import Path

from ultrafuser_mega.errors import InputError

EXPECTED = "expected JSON, JSONL (either may be gzipped) or Parquet"
Bytes = gzip.GzipFile | io.BufferedReader
GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)

_READ = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz", ".parquet")
_NOT_READ = {".csv": "CSV", ".tsv": "TSV", ".txt": "plain text", ".yaml": "YAML", ".yml": "YAML"}
_PACKED = (".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".arrow", ".gz")
_FOREIGN = (
    (b"\x28\xb5\x2f\xfd", "zstd-compressed"),
    (b"\xfd7zXZ\x00", "xz-compressed"),
    (b"BZh", "bzip2-compressed"),
    (b"PK\x03\x04", "a zip archive"),
    (b"ARROW1", "an Arrow file"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (codecs.BOM_UTF16_LE, "UTF-16 text"),
    (codecs.BOM_UTF16_BE, "UTF-16 text"),
)
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_HEAD = 1 << 16  # bytes that are looked at
_LINES = 50
_LONGEST_TOKEN = 16  # characters of what is not a string: "-Infinity"


class Format(Enum):
    """How the rows lie in a file; ARRAY and LINES may be gzipped."""

    ARRAY = "JSON"
    LINES = "JSONL"
    PARQUET = "Parquet"


def expand_files(entry: Path) -> list[Path]:
    """The files of an entry, sorted by name: itself, the data files right in a folder, or what a glob matches.

    Raises InputError where there is none.
    """
    if entry.is_file():
        return [entry]
    if entry.is_dir():
        suffixes = (*_READ, *_NOT_READ, *_PACKED)  # those that are not read as well: they are refused, not passed over
        inside = (file for file in entry.iterdir() if file.is_file() and not file.name.startswith((".", "_")))
        files = sorted(file for file in inside if file.name.lower().endswith(suffixes))
        if not files:
            raise InputError(f"{entry}: a folder without data files; expected some of {', '.join(_READ)}")
        return files
    folder = next(parent for parent in entry.parents if parent.is_dir())  # which may have [brackets] in its name
    pattern = str(entry.relative_to(folder))
    if glob.has_magic(pattern):
        # pathlib's own glob wants a relative pattern and a folder to start from
        found = glob.glob(str(Path(glob.escape(str(folder))) / pattern), recursive=True)  # noqa: PTH207
        files = sorted(file for file in map(Path, found) if file.is_file())
        if not files:
            raise InputError(f"{entry}: no file matches")
        return files
    raise InputError(f"{entry}: no such file")


def find_format(path: Path) -> Format:
    """The format of a file. Raises InputError if it cannot be read, is in another format or needs a missing library."""
    try:
        with path.open("rb") as raw, unpacked(raw) as file:
            head = file.read(_HEAD)
    except GZIP_ERRORS as error:
        raise InputError(f"{path}: damaged gzip: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if head.startswith(_PARQUET):
        _need_pyarrow(path)
        return Format.PARQUET
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            raise InputError(f"{path}: is {what}; {EXPECTED}")
    text = head.removeprefix(codecs.BOM_UTF8)
    if text.lstrip().startswith(b"["):
        return Format.ARRAY
    _refuse_other_text(path, text, is_whole=len(head) < _HEAD)
    return Format.LINES


def unpacked(raw: io.BufferedReader) -> Bytes:
    """The bytes of an opened file, unzipped if it is gzipped. Reading them may raise one of ``GZIP_ERRORS``."""
    is_gzipped = raw.read(len(_GZIP)) == _GZIP
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if is_gzipped else raw


def _refuse_other_text(path: Path, text: bytes, *, is_whole: bool) -> None:
    """Refuse text none of whose first lines is a JSON object: one bad row does not make another format of a file."""
    lines = text.split(b"\n")
    complete = [line.strip() for line in (lines if is_whole or len(lines) == 1 else lines[:-1])]
    first = [line for line in complete if line][:_LINES]
    if _is_object_over_many_lines(text.decode("utf-8", "replace").lstrip(), is_whole):
        raise InputError(f"{path}: is one JSON object over many lines; expected an array [...] or an object per line")
    if not first or any(_is_object(line) for line in first) or all(line.startswith(b"{") for line in first):
        return
    suffix = path.name.lower().removesuffix(".gz")
    for ending, what in _NOT_READ.items():
        if suffix.endswith(ending):
            raise InputError(f"{path}: is {what}; {EXPECTED}")
    shown = first[0][:40].decode("utf-8", "replace")
    raise InputError(f"{path}: its lines are no JSON objects (the first: {shown!r}); {EXPECTED}")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_object_over_many_lines(text: str, is_whole: bool) -> bool:
    if not text.startswith("{"):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:  # perhaps only where the text was cut off
        cut_off = error.msg.startswith("Unterminated string") or error.pos + _LONGEST_TOKEN > len(text)
        end = error.pos if cut_off and not is_whole else 0
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end]


def _need_pyarrow(path: Path) -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise InputError(f"{path}: Parquet is read by pyarrow, which is not installed; pip install pyarrow") from None
