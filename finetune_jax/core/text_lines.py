"""Text files of data: decoding, and where their lines end.

A line ends with a line feed, with or without a carriage return before it. All other signs
that Python takes for line ends (U+2028, U+0085, form feed, ...) are characters of a line.
"""

import codecs
import pathlib

from finetune_jax.core.errors import UserError

# Byte order marks of files in UTF-16 and UTF-32.
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
# First bytes of compressed files: their format, and the program that unpacks them.
_PACKED = {
    b"\x1f\x8b": ("gzip", "gzip -d"),
    b"BZh91AY&SY": ("bzip2", "bzip2 -d"),
    b"\xfd7zXZ": ("xz", "xz -d"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
    b"PK\x03\x04": ("ZIP, as Excel's .xlsx is", "unzip, or save it as CSV in Excel"),
}
# Bytes in which a NUL is looked for; text in UTF-8 has none.
_BEGIN = 4096


def check_begin(data: bytes, path: pathlib.Path) -> None:
    """Checks that a file does not begin as UTF-16 or compressed files do.

    Args:
        data: First bytes of the file.
        path: Its path, for the message.

    Raises:
        UserError: It does.
    """
    for begin, (name, program) in _PACKED.items():
        if data.startswith(begin):
            raise UserError(f"{path}: compressed by {name}; unpack it with {program}")
    if data.startswith(_WIDE) or b"\0" in data[:_BEGIN]:
        raise UserError(
            f"{path}, line 1: not text in UTF-8 but probably UTF-16, as Excel's 'Unicode "
            "text' is, or compressed; convert UTF-16 by iconv -f UTF-16 -t UTF-8 FILE"
        )


def decoded(path: pathlib.Path) -> str:
    """Returns the text of a file in UTF-8.

    Raises:
        UserError: The file cannot be read, or is not UTF-8; names the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    check_begin(data, path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 ({error.reason}, byte "
            f"0x{data[error.start]:02x}); convert the file to UTF-8"
        ) from error


def lines_of(text: str, where: object) -> list[str]:
    r"""Returns the lines of a text, without their ends.

    A text without any line feed may have carriage returns alone, as old Macs wrote.

    >>> lines_of("a\r\nb\u2028c\n", "x.txt"), lines_of("a\rb\r", "x.txt")
    (['a', 'b\u2028c'], ['a', 'b'])

    Args:
        text: Content of a file.
        where: The file, for the message.

    Raises:
        UserError: There are both line feeds and carriage returns of their own.
    """
    text = text.replace("\r\n", "\n")
    if "\r" in text and "\n" in text:
        line = text[: text.index("\r")].count("\n") + 1
        raise UserError(
            f"{where}, line {line}: a carriage return within the line, while others end "
            "with a line feed; end all lines with a line feed"
        )
    lines = text.replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]
