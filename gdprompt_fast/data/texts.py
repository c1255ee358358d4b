"""Text files as people have them: gzipped or not, with a byte order mark, in any encoding."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from ..errors import UserError

GZIP = b"\x1f\x8b"
OTHER_FORMATS = {
    **{b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"},
    **{b"PAR1": "Parquet", b"ARROW1": "Arrow", b"SQLite format 3": "SQLite"},
}
UTF_8 = "utf-8"


def read_text(path: Path, encoding: str = UTF_8) -> str:
    """The text of a file, unpacked if it is gzip, without a byte order mark.

    Raises:
        ValueError: naming the file and, where bytes are not of the encoding, the line and the
            option; or the encoding, if there is none of that name.
    """
    content = path.read_bytes()
    if content.startswith(GZIP):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: expected a whole gzip file, got {error}") from None
    for begins, form in (*OTHER_FORMATS.items(), (GZIP, "gzip in a gzip")):
        if content.startswith(begins):
            raise UserError(f"{path}: expected text, gzipped or not, got a {form} file")
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = _line(content[: error.start], encoding)
        raise UserError(
            f"{path}{line}: expected text in {encoding}, got bytes that are none ({error.reason}); "
            "--encoding names another, as utf-16 or cp1252"
        ) from None
    except (LookupError, ValueError) as error:
        raise UserError(
            f"encoding: expected one for {path} that Python knows, got {encoding!r} ({error})"
        ) from None


def _line(before: bytes, encoding: str) -> str:
    """The line that comes after these bytes; nothing for codecs that cannot decode a part."""
    try:
        return f", line {before.decode(encoding).count(chr(10)) + 1}"
    except UnicodeError:
        return ""
