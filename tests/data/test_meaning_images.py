"""Odd image files and folders: the same numbers as clean ones, a line, or a refusal."""

import os
import pathlib

import jax
import meaning
import numpy as np
import pictures
import pytest
import small
from meaning import Odd
from PIL import Image, ImageOps

from finetune_jax import config as configs
from finetune_jax.core.errors import UserError
from finetune_jax.data.images import depth
from finetune_jax.data.images.decoding import Geometry, oriented_size, read_image
from finetune_jax.data.images.image_formats import image_suffixes, why_no_image
from finetune_jax.data.images.mask_files import MaskFiles, read_mask
from finetune_jax.data.kind import Resources, kind_named, kind_of
from finetune_jax.data.loading import load_source
from finetune_jax.data.preprocessing import ArraySpec, array_spec
from finetune_jax.data.reading.files import is_litter
from finetune_jax.data.spec import DataSpec
from finetune_jax.models import make_model
from finetune_jax.models.layers.sizes import TooSmall, least_side
from finetune_jax.modes import predict
from finetune_jax.tasks.components.random_state import shapes_of

RED = pictures.image(pictures.COLOURS["red"], 1)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


# --- Folders of classes ---


def photos(root):
    """Writes two classes of one photo each; returns the folder of the first class."""
    for name, colour in (("blue", "blue"), ("red", "red")):
        (root / name).mkdir()
        seed = 1 if name == "red" else 2
        values = pictures.image(pictures.COLOURS[colour], seed)
        Image.fromarray(values).save(root / name / "a.png")
    return root / "red"


def read_folder(root):
    source = load_source("folder", str(root))
    part = source.splits["all"]
    images = [part.read(at) for at in range(len(part))]
    return [part.label, *images], [*source.warnings, *source.not_used]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean")
    photos(root)
    return read_folder(root)[0]


def saved_as(name, kind, **options):
    """Returns a maker of the folder in which the red photo has another form."""

    def make(root):
        folder = photos(root)
        (folder / "a.png").unlink()
        Image.fromarray(RED).save(folder / name, kind, **options)
        return root

    return make


def beside(place, content=b"text", below=None):
    """Returns a maker of the folder with one more file in it."""

    def make(root):
        photos(root)
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is Image:
            Image.fromarray(RED).save(path, below)
        else:
            path.write_bytes(content)
        return root

    return make


FORMS = [
    ("a", "PNG", {}), ("a.dat", "PNG", {}), ("a.txt", "PNG", {}), ("a.b.c", "PNG", {}),
    ("a.jpg", "PNG", {}), ("A.PNG", "PNG", {}), ("a.apng", "PNG", {}),
    ("a.bmp", "BMP", {}), ("a.dib", "DIB", {}), ("a", "BMP", {}),
    ("a.tga", "TGA", {}), ("a.TGA", "TGA", {}), ("a", "TGA", {}),
    ("a.jp2", "JPEG2000", {}), ("a.j2k", "JPEG2000", {}), ("a", "JPEG2000", {}),
    ("a.tif", "TIFF", {}), ("a", "TIFF", {"compression": "tiff_lzw"}),
    ("a.webp", "WEBP", {"lossless": True}), ("a", "WEBP", {"lossless": True}),
    ("a.ppm", "PPM", {}), ("a.pnm", "PPM", {}), ("a", "PPM", {}),
    ("a.pcx", "PCX", {}), ("a.sgi", "SGI", {}), ("a.qoi", "QOI", {}),
    ("a.dds", "DDS", {}), ("photo with blanks", "PNG", {}),
]  # fmt: skip
TOLD = [
    ("red/notes.txt", b"text", "1 file not used: 1 .txt .no images that Pillow"),
    ("red/a.json", b"{}", "1 .json"),
    ("red/a.XML", b"<?xml version='1.0'?>", "1 .xml"),
    ("red/deep/er/a.csv", b"a,b\n1,2\n", "1 .csv"),
    ("red/empty", b"", "1 without suffix"),
    ("red/a.heic", HEIC, "1 .heic"),
    ("red/a.svg", SVG, "1 .svg"),
    ("red/a.pdf", b"%PDF-1.4\n", "1 .pdf"),
    ("red/a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", "1 .eps"),
    ("red/a.mp4", b"\0\0\0\x18ftypmp42" + b"\0" * 64, "1 .mp4"),
    ("red/a.npy", b"\x93NUMPY\x01\0", "1 .npy"),
    ("red/a.cr2", b"II*\0\x10\0\0\0CR\2\0", "1 .cr2 .raw camera data"),
    ("red/b.png.part", Image, "1 .part .unfinished files or copies"),
    ("red/b.bak", Image, "1 .bak .unfinished files or copies"),
    ("README.md", b"# Photos", "1 .md"),
    ("labels.csv", b"a,b\n", "1 .csv"),
]
LITTER = [
    "red/Thumbs.db", "red/THUMBS.DB", "desktop.ini", "red/Desktop.ini", ".DS_Store",
    "red/._a.png", "red/.hidden.png", "red/@eaDir/a.png", "@eaDir/red/a.png",
    "__MACOSX/red/a.png", "$RECYCLE.BIN/a.png", "#recycle/red/a.png",
    "System Volume Information/a.png", "lost+found/a.png", "red/Icon\r", "red/~$a.docx",
    ".ipynb_checkpoints/a.png", "red/.nfs0001", "red/a.png~",
    "red/a.png:Zone.Identifier", ".Trashes/a.png", ".fseventsd/a.png",
]  # fmt: skip
FOLDERS = [
    *(Odd(name=f"{kind} {name}", make=saved_as(name, kind, **options), same=True)
      for name, kind, options in FORMS),
    *(Odd(name=place, make=beside(place, content, "PNG"), same=True, warns=told)
      for place, content, told in TOLD),
    *(Odd(name=place, make=beside(place, Image, "PNG"), same=True,
          warns="1 hidden or system entry not used") for place in LITTER),
    Odd(name="a photo outside of classes", make=beside("b.png", Image),
        refuses="b.png: not in the folder of a class"),
    Odd(name="a photo without suffix outside of classes", refuses="b: not in the folder",
        make=beside("b", Image, "PNG")),
    Odd(name="a class of other files", make=beside("green/a.heic", HEIC),
        refuses="(?s)green: no images in it, but 1 other file.*1 .heic"),
    Odd(name="a cut photo", make=beside("red/b.png", b"\x89PNG\r\n\x1a\n"),
        refuses="b.png: cannot be read|b.png: not an image"),
    Odd(name="a page that says it is a photo", make=beside("red/b.jpg", b"<html>"),
        refuses="b.jpg: not an image"),
    Odd(name="postscript that says it is a photo", refuses="b.png: not an image",
        make=beside("red/b.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
]  # fmt: skip


@meaning.by_name(FOLDERS)
def test_odd_files_in_folders_of_classes(odd, clean, tmp_path):
    meaning.check(odd, read_folder, clean, tmp_path)


def test_reasons_and_suffixes_are_counted(tmp_path):
    folder = photos(tmp_path)
    for number in range(3):
        (folder / f"{number}.txt").write_text("x")
        (folder / f"{number}.nef").write_bytes(b"II*\0")
    (folder / "1.heic").write_bytes(HEIC)
    (tmp_path / ".DS_Store").write_text("x")
    files, litter = load_source("folder", str(tmp_path)).not_used
    assert files.startswith(f"{tmp_path}: 7 files not used: ")
    for part in ("3 .txt, 1 .heic (no images", "3 .nef (raw camera data"):
        assert (
            part in files or part.replace("3 .txt, 1 .heic", "1 .heic, 3 .txt") in files
        )
    assert "'.DS_Store'" in litter


def test_files_beside_splits_are_told_or_refused(tmp_path):
    pictures.make_folder(tmp_path, examples=1, splits=("train", "test"))
    (tmp_path / "README.txt").write_text("x")
    (tmp_path / "train" / "labels.csv").write_text("x")
    (line,) = load_source("folder", str(tmp_path)).not_used
    assert "2 files not used: 1 .txt, 1 .csv" in line.replace(
        "1 .csv, 1 .txt", "1 .txt, 1 .csv"
    )
    Image.fromarray(RED).save(tmp_path / "stray.png")
    with pytest.raises(UserError, match="stray.png: neither a split nor in one"):
        load_source("folder", str(tmp_path))


@pytest.mark.parametrize("name", ["pipe", "pipe.png"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(photos(tmp_path) / name)
    assert "no plain files" in load_source("folder", str(tmp_path)).not_used[0]


def test_a_link_to_a_missing_photo_is_not_passed_over(tmp_path):
    folder = photos(tmp_path)
    (folder / "b.png").symlink_to(folder / "gone.png")
    with pytest.raises(UserError, match="b.png: cannot be read"):
        read_folder(tmp_path)
    (folder / "b.png").rename(folder / "b")
    assert (
        "cannot be opened: No such file"
        in load_source("folder", str(tmp_path)).not_used[0]
    )


def test_known_suffixes_are_of_formats_that_can_be_read():
    wanted = {".jpg", ".jfif", ".jpe", ".png", ".avif", ".pbm", ".tga", ".jp2", ".webp"}
    assert wanted <= image_suffixes()
    assert not image_suffixes() & {".pdf", ".eps", ".ps", ".mpg", ".h5", ".wmf", ".txt"}


def test_files_of_chance_are_no_images(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(200):
        path = tmp_path / f"{number}"
        path.write_bytes(rng.integers(0, 4 + 252 * (number % 2), 600, np.uint8))
        assert why_no_image(path)


@pytest.mark.parametrize("name", ["class~x", "Images", "photo.png", "recycle", "icon"])
def test_ordinary_names_are_no_litter(name):
    assert not is_litter(name)


# --- Inputs of predictions ---


def rule(kind="images", shape=(8, 8, 3), dtype="uint8"):
    spec = DataSpec(
        kind=kind, shape=shape, train_shape=shape, dtype=dtype, inputs=ArraySpec()
    )
    return kind_named(kind).reader(spec, {}, pathlib.Path()).files


def test_a_folder_of_inputs_is_used_or_told(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    for name, kind, options in FORMS:
        Image.fromarray(RED).save(folder / f"{kind}_{name}", kind, **options)
    Image.fromarray(RED).save(folder / "x.jfif", "JPEG")
    Image.fromarray(RED).save(folder / "x.avif", "AVIF")
    Image.fromarray(RED).convert("1").save(folder / "x.pbm")
    Image.fromarray(RED).save(folder / "Thumbs.db", "PNG")
    (folder / "a.heic").write_bytes(HEIC)
    (folder / "notes.txt").write_text("x")
    found, lines = predict.find_inputs([str(folder)], rule())
    assert len(found) == len(FORMS) + 3
    told = "\n".join(lines)
    assert "2 files not used" in told and "1 hidden or system entry" in told
    found, lines = predict.find_inputs([str(folder / "PNG_a")], rule())
    assert len(found) == 1 and not lines


def test_inputs_that_are_no_images_are_refused(tmp_path):
    for name in ("a.heic", "b.txt", "c"):
        (tmp_path / name).write_bytes(HEIC)
    with pytest.raises(UserError) as error:
        predict.find_inputs([str(tmp_path / n) for n in ("a.heic", "c")], rule())
    assert "a.heic: no image" in str(error.value) and "c: no image" in str(error.value)
    with pytest.raises(UserError, match="(?s)no images in.*3 files not used"):
        predict.find_inputs([str(tmp_path)], rule())


def test_a_model_of_vectors_takes_the_arrays_of_a_folder(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((1, 4)))
    Image.fromarray(RED).save(tmp_path / "b.png")
    kind = rule("vectors", (4,), "float32")
    found, lines = predict.find_inputs([str(tmp_path)], kind)
    assert [path.name for path in found] == ["a.npy"] and "1 .png" in lines[0]
    with pytest.raises(UserError, match="b.png: no array"):
        predict.find_inputs([str(tmp_path / "b.png")], kind)


def test_inputs_of_too_few_bits_are_told(tmp_path):
    Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(tmp_path / "a.png")
    _, lines = predict.find_inputs([str(tmp_path)], rule())
    assert "warning: --inputs: 1 image of 16 bits" in lines[0] and "by 16" in lines[0]


# --- Texts and tables ---


@pytest.mark.parametrize("name", ["tsv", "csv"])
def test_files_beside_texts_and_tables_are_told(tmp_path, name):
    sign = {"tsv": "\t", "csv": ","}[name]
    rows = "\n".join(sign.join(row) for row in ("sl", "gx", "by", "gz", "bw"))
    for split in ("train", "TEST"):
        path = tmp_path / f"{split}.{name.upper() if split == 'TEST' else name}"
        path.write_text(rows.replace(f"s{sign}l", f"sentence{sign}label") + "\n")
    for other in ("notes.md", f"dev.{name}.gz", f"._train.{name}", "more/dev.txt"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("x")
    config = configs.default().data
    config.update(name=name, dir=str(tmp_path), text=("sentence",), label="label")
    told = "\n".join(_text_source(config).not_used)
    assert "3 files not used" in told and "1 hidden or system entry" in told
    for part in ("1 .md", "1 .gz", "1 .txt (in subfolders)"):
        assert part in told


def opened(config, tokenizer=None):
    kind = kind_named(kind_of(config))
    return kind.open(config, Resources(tokenizer=lambda: tokenizer))


def _text_source(config):
    from tokenizers import Tokenizer, models

    tokens = ("[UNK]", "[PAD]", "[CLS]", "[SEP]")
    vocabulary = dict(zip(tokens, range(len(tokens))))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")).to_str()
    return opened(config, tokenizer).source


def test_files_beside_tables_are_told(tmp_path):
    for split in ("train", "test"):
        rows = "".join(f"{at},{at % 2}\n" for at in range(6))
        (tmp_path / f"{split}.csv").write_text("a,label\n" + rows)
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "._train.csv").write_bytes(b"\0\5\x16\7")
    config = configs.default().data
    config.update(
        name="csv", dir=str(tmp_path), label="label", columns=(("a", "number"),)
    )
    config.cache_dir = str(tmp_path / "cache")
    found = opened(config)
    source = found.source
    assert found.kind == "tables" and set(source.splits) == {"train", "test"}
    assert "1 .md (no files of a split)" in "\n".join(source.not_used)


# --- Orientation ---

# Grey in one corner alone, so that no two orientations look alike.
CORNER = np.zeros((48, 64, 3), np.uint8)
CORNER[:24, :32] = 255
LOSSLESS = {"png": {}, "tif": {}, "webp": {"lossless": True}}
GEOMETRIES = [
    None,
    Geometry(shape=(32, 32, 3)),
    Geometry(shape=(24, 24, 3), resize=24),
    Geometry(shape=(16, 16, 3), decode="fast"),
]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg", "avif", "mpo"])
def test_an_image_and_its_mask_agree_in_every_orientation(
    tmp_path, suffix, orientation
):
    exif, image = Image.Exif(), Image.fromarray(CORNER)
    exif[0x0112] = orientation
    photo = tmp_path / f"photo.{suffix}"
    options = {"quality": 100, **LOSSLESS.get(suffix, {})}
    if suffix == "mpo":
        options |= {"format": "MPO", "save_all": True}
    image.save(tmp_path / "other.png", exif=exif)
    image.save(photo, exif=exif, **options)  # AVIF takes the orientation out of `exif`.
    with Image.open(tmp_path / "other.png") as other:
        upright = np.asarray(ImageOps.exif_transpose(other))[..., 0] > 127
    Image.fromarray(upright.astype(np.uint8)).save(tmp_path / "mask.png")
    files = MaskFiles(
        images=(photo,), masks=(tmp_path / "mask.png",), classes=2, colours={}
    )
    assert oriented_size(photo) == upright.shape[::-1]
    for geometry in GEOMETRIES:
        found = files.read(0, geometry)
        np.testing.assert_array_equal(found[..., 0] > 127, found[..., 3] == 1)
    if orientation > 4:
        stored = np.zeros(CORNER.shape[:2], np.uint8)
        Image.fromarray(stored).save(tmp_path / "mask.png")
        with pytest.raises(UserError, match="64x48 pixels, but its image"):
            files.read(0)


@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_a_mask_with_an_orientation_is_refused(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(CORNER[..., 0] // 255).save(tmp_path / "mask.png", exif=exif)
    with pytest.raises(UserError, match=f"mask.png: .*orientation {orientation}"):
        read_mask(tmp_path / "mask.png", 2, {})


def test_formats_that_change_size_when_they_are_decoded(tmp_path):
    for name, kind in (("a.ico", "ICO"), ("a.icns", "ICNS")):
        Image.fromarray(RED).resize((32, 32)).save(tmp_path / name, kind)
        shape = read_image(tmp_path / name).shape
        assert oriented_size(tmp_path / name) == shape[1::-1]


# --- Masks ---


def test_predicted_masks_are_as_large_as_their_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    spec = _scene_spec()
    write = kind_named("images").record_writer(spec, tmp_path / "masks")
    names = (os.fsdecode(b"caf\xe9.tif"), "no suffix", "a.TGA", "b.jp2")
    for name, kind in zip(names, ("TIFF", "PNG", "TGA", "JPEG2000")):
        Image.fromarray(CORNER).save(tmp_path / name, kind, exif=exif)
        record = {"mask": np.ones((16, 16), np.uint8)}
        written = write(record, str(tmp_path / name))["mask"]
        with Image.open(written) as mask:
            assert mask.size == oriented_size(tmp_path / name)
            assert mask.size == ((48, 64) if kind in ("TIFF", "PNG") else (64, 48))
    written = write({"mask": np.ones((16, 16), np.uint8)}, "x.npy#3")["mask"]
    with Image.open(written) as mask:
        assert mask.size == (16, 16) and written.endswith("x.npy_3.png")


def _scene_spec():
    config = configs.default().data
    return DataSpec(
        kind="images", shape=(16, 16, 3), train_shape=(16, 16, 3), dtype="uint8",
        inputs=array_spec(config), pixel_classes=("sky", "road"), train_counts=(1,),
    )  # fmt: skip


def scene(root):
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    Image.fromarray(CORNER).save(root / "images" / "a.png")
    Image.fromarray(CORNER[..., 0] // 255).save(root / "masks" / "a.png")
    (root / "classes.csv").write_text("sky\nroad\n")
    return root


def scene_with(place, content=b"text"):
    def make(root):
        path = scene(root) / place
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return root

    return make


def moved(kind, name, **options):
    def make(root):
        path = scene(root) / kind / "a.png"
        with Image.open(path) as image:
            image.save(root / kind / name, **options)
        path.unlink()
        return root

    return make


SCENES = [
    Odd(name="image without suffix", make=moved("images", "a", format="PNG"), same=True),
    Odd(name="image as .bmp", make=moved("images", "a.bmp"), same=True),
    Odd(name="image as .tga", make=moved("images", "a.TGA"), same=True),
    Odd(name="mask without suffix", make=moved("masks", "a", format="PNG"), same=True),
    Odd(name="mask as .PNG", make=moved("masks", "a.PNG"), same=True),
    Odd(name="mask as .gif", make=moved("masks", "a.gif"), refuses="a.gif: not a PNG"),
    Odd(name="mask in TIFF without suffix", make=moved("masks", "a", format="TIFF"),
        refuses="a mask in the format TIFF"),
    Odd(name="text beside images", make=scene_with("images/a.txt"), same=True,
        warns="1 .txt"),
    Odd(name="text beside masks", make=scene_with("masks/a.json"), same=True,
        warns="1 .json"),
    Odd(name="thumbnails", make=scene_with("images/Thumbs.DB"), same=True,
        warns="hidden or system"),
    Odd(name="a folder of a network disk", make=scene_with("masks/@eaDir/b.png"),
        same=True, warns="hidden or system"),
    Odd(name="another folder", make=scene_with("boxes/a.xml"), same=True,
        warns="1 .xml .neither in images nor in masks"),
    Odd(name="a split beside images", make=scene_with("train/a.png"), same=True,
        warns="1 .png .neither in images nor in masks"),
    Odd(name="a photo from a telephone", make=scene_with("images/b.heic", HEIC),
        same=True, warns="1 .heic"),
    Odd(name="a mask of it", make=scene_with("masks/b.png", HEIC),
        refuses="b.png: no image"),
]  # fmt: skip


def read_scene(root):
    source = load_source("masks", str(root))
    part = source.splits["all"]
    return [part.read(0)], [*source.warnings, *source.not_used]


@meaning.by_name(SCENES)
def test_odd_files_beside_masks(odd, tmp_path):
    clean, warnings = read_scene(scene(tmp_path / "clean"))
    assert not warnings
    meaning.check(odd, read_scene, clean, tmp_path / "odd")


def test_a_folder_beside_splits_of_masks_is_told(tmp_path):
    scene(tmp_path / "train")
    (tmp_path / "train" / "classes.csv").rename(tmp_path / "classes.csv")
    scene(tmp_path / "extra")
    told = "\n".join(load_source("masks", str(tmp_path)).not_used)
    assert "3 files not used" in told and "2 .png" in told


# --- 16-bit images with fewer bits ---


def sixteen(bits, suffix="png", shift=0):
    """Returns a maker of a folder of 16-bit images whose values need some bits."""

    def make(root):
        for name in ("blue", "red"):
            (root / name).mkdir()
            for number in range(5):
                rng = np.random.default_rng(number)
                values = rng.integers(0, 2**bits, (6, 5)).astype(np.uint16)
                values[0, 0] = 2**bits - 1
                path = root / name / f"{number}.{suffix}"
                Image.fromarray(values << shift).save(path)
        return root

    return make


DEPTHS = [
    *(Odd(name=f"{bits} bits", make=sixteen(bits),
          warns=rf"10 images.*below {2**bits:,} \({bits} bits\).*by {2**(16 - bits)} and")
      for bits in (8, 10, 11, 12, 13, 14)),
    Odd(name="12 bits in TIFF", make=sixteen(12, "tif"), warns="12 bits"),
    Odd(name="12 bits in JPEG 2000", make=sixteen(12, "jp2"), warns="12 bits"),
    Odd(name="12 bits above", make=sixteen(12, shift=4), same=True),
]  # fmt: skip


@meaning.by_name(DEPTHS)
def test_images_of_fewer_bits(odd, tmp_path):
    for name in ("clean", "odd"):
        (tmp_path / name).mkdir()
    clean, _ = read_folder(sixteen(12, shift=4)(tmp_path / "clean"))
    meaning.check(odd, read_folder, clean, tmp_path / "odd")


def test_bright_images_among_dark_ones_and_bytes_are_not_warned_of(tmp_path):
    for name in ("blue", "red"):
        (tmp_path / name).mkdir()
        for number in range(4):
            values = np.full((4, 4), 40_000 if number == 3 else 900, np.uint16)
            Image.fromarray(values).save(tmp_path / name / f"{number}.png")
    assert not read_folder(tmp_path)[1]
    dark = tmp_path / "dark.png"
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(dark)
    assert not depth.depth_warnings("here", [dark, tmp_path / "gone.png"])


# --- Images too small for a model ---


@pytest.mark.parametrize(
    "name, side, least",
    [("cnn", 3, 4), ("vgg11", 31, 32)],
)
def test_images_that_are_too_small_are_refused_by_name(name, side, least):
    config, problems = configs.resolve(_small_config(name))
    assert not problems
    task = small.task_of(config, _spec(config, side))
    wanted = (
        rf"{side}x{side} pixels are too small for {name} \(at least {least}x{least}\)"
    )
    with pytest.raises(UserError, match=wanted):
        shapes_of(task, name)
    shapes_of(small.task_of(config, _spec(config, least)), name)


def _small_config(name, **task):
    given = configs.default()
    given.data.name, given.model.name = "digits", name
    given.task.update(task)
    return given


def _spec(config, side):
    return DataSpec(
        kind="images", shape=(side, side, 1), train_shape=(side, side, 1),
        dtype="uint8", inputs=array_spec(config.data), class_names=("a", "b"),
        train_counts=(1, 1),
    )  # fmt: skip


@pytest.mark.parametrize(
    "name, side, is_enough",
    [("resnet8", 1, True), ("resnet18", 1, True), ("efficientnet_lite0", 1, True),
     ("convnext_tiny", 4, False), ("vgg11_bn", 3, False)],
)  # fmt: skip
def test_every_family_takes_an_image_or_refuses_it(name, side, is_enough):
    model = make_model(name, {"head": {}}, classes=2)

    def init(x):
        return model.init(jax.random.key(0), x, train=False)

    image = jax.ShapeDtypeStruct((1, side, side, 3), "float32")
    if is_enough:
        assert least_side(init, 3, side) == side
    else:
        with pytest.raises(TooSmall):
            jax.eval_shape(init, image)
