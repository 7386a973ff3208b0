"""Which files are images: every format that Pillow can read, by suffix or by content."""

import functools
import os
import pathlib
import stat
from collections.abc import Iterable

from PIL import Image, UnidentifiedImageError

from finetune_jax.data.reading.files import FileNotes

# Formats that Pillow opens and cannot decode by itself, or that are no pictures.
_NOT_READ = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"))
# TIFF files inside, of which Pillow would read the thumbnail.
_RAW = frozenset(
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf "
    ".pef .raf .raw .rw2 .rwl .sr2 .srf .srw .x3f".split()
)
_COPIES = frozenset(
    ".bak .crdownload .download .old .orig .part .partial .swp .temp .tmp".split()
)
# TGA has no mark at the beginning; version 2 has one at the end.
_TGA_MARK = b"TRUEVISION-XFILE.\0"


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Returns the names of the formats that Pillow can read here."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_READ)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Returns the suffixes of these formats, in lower case."""
    formats, known = image_formats(), Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in formats)


def why_no_image(path: pathlib.Path) -> str | None:
    """Returns why a file is not used as an image; None if it is one.

    A file with the suffix of an image is not opened: reading it tells. Of all other files
    the first bytes are read.
    """
    suffix = path.suffix.lower()
    if _is_special(path):
        return "no plain files"
    if suffix in image_suffixes():
        return None
    if suffix in _RAW:
        return "raw camera data; save them as PNG or JPEG"
    if suffix in _COPIES:
        return "unfinished files or copies"
    try:
        with Image.open(path, formats=image_formats()) as image:
            is_image = image.format != "TGA" or _has_tga_mark(path)
    except UnidentifiedImageError:
        is_image = False
    except Image.DecompressionBombError:  # Reading it says how large it is.
        return None
    except OSError as error:
        return f"cannot be opened: {error.strerror or error}"
    except Exception:  # Pillow's plugins raise whatever the content leads to.
        is_image = False
    return None if is_image else "no images that Pillow can read"


def _is_special(path: pathlib.Path) -> bool:
    """Returns whether a file is a pipe, a socket or a device, which never ends."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:  # Such as a link to a missing file; opening it says so.
        return False


def images_of(files: Iterable[pathlib.Path], notes: FileNotes) -> list[pathlib.Path]:
    """Returns the images among files; all others are in the notes."""
    found = []
    for path in files:
        if reason := why_no_image(path):
            notes.add(path, reason)
        else:
            found.append(path)
    return found


def _has_tga_mark(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        file.seek(-len(_TGA_MARK), os.SEEK_END)
        return file.read() == _TGA_MARK
