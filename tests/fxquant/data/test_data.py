from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torchvision import transforms

from fxquant.data import ImageBatches, Preprocessing, data_root, open_batches, open_images
from fxquant.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from fxquant.errors import DataError

PLAIN = Preprocessing()


def picture(path: Path, value: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def labelled_folder(folder: Path, labels: list[int]) -> Path:
    rows = []
    for index, label in enumerate(labels):
        picture(folder / f"{index}.png", value=index)
        rows.append(f"{index}.png,{label},n{label:08}")
    (folder / "labels.csv").write_text("\n".join(["file,label,wnid", *rows]))
    return folder


def archive(path: Path, count: int = 5, channels: int = 3) -> Path:
    pixels = numpy.arange(count, dtype=numpy.uint8).reshape(count, 1, 1, 1)
    pixels = numpy.broadcast_to(pixels, (count, 4, 4, channels))
    numpy.savez(path, images=pixels, labels=numpy.arange(count))
    return path


# -- preprocessing -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 260), (100, 301), (256, 256)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocessing_gives_the_pixels_of_torchvision(
    size: tuple[int, int], interpolation: str
) -> None:
    pixels = numpy.random.RandomState(0).randint(0, 256, (*size, 3), dtype=numpy.uint8)
    image = Image.fromarray(pixels)
    expected = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )(image)
    assert torch.equal(
        Preprocessing.parse(f"imagenet,interpolation={interpolation}")(image), expected
    )


def test_preprocessing_is_parsed_with_changes() -> None:
    parsed = Preprocessing.parse("imagenet, resize=none, crop=160, mean=0.5, std=0.1:0.2:0.3")
    assert parsed == Preprocessing(None, 160, "bilinear", (0.5, 0.5, 0.5), (0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagenett", "did you mean 'imagenet'"),
        ("imagenet,corp=3", "did you mean 'crop'"),
        ("imagenet,crop=big", "cannot read crop=big"),
        ("imagenet,crop=0", "crop is 0"),
        ("imagenet,resize=100", "does not fit into images resized to 100"),
        ("imagenet,interpolation=cubic", "did you mean 'bicubic'"),
        ("imagenet,mean=1:2", "three numbers"),
        ("imagenet,std=0", "positive"),
    ],
)
def test_wrong_preprocessing_is_an_error(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Preprocessing.parse(text)


def test_gray_and_transparent_images_become_rgb() -> None:
    for mode in ("L", "RGBA", "P"):
        assert PLAIN(Image.new(mode, (4, 4))).shape == (3, 4, 4)


# -- where images come from ----------------------------------------------------------------------


def test_class_folders_count_labels_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/1.png", "a/0.png"):
        picture(tmp_path / name)
    (tmp_path / "a" / ".hidden").write_text("x")
    images = open_images(tmp_path)
    assert images.names == tuple(str(tmp_path / name) for name in ("a/0.png", "a/1.png", "b/2.png"))
    assert images.labels == (0, 0, 1)


def test_labels_csv_names_files_and_labels(tmp_path: Path) -> None:
    images = open_images(labelled_folder(tmp_path, [7, 3]))
    assert images.labels == (7, 3)


def test_a_folder_of_images_has_no_labels(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    batches = open_batches(tmp_path, preprocessing="none")
    assert not batches.labelled
    assert next(iter(batches))[1].tolist() == [-1]


@pytest.mark.parametrize("channels", [1, 3])
def test_an_archive_holds_pixels_and_labels(tmp_path: Path, channels: int) -> None:
    batches = open_batches(archive(tmp_path / "x.npz", channels=channels), preprocessing="none")
    images, labels = next(iter(batches))
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(images[3], torch.full((3, 4, 4), 3 / 255))


def test_takes_images_spread_or_first(tmp_path: Path) -> None:
    images = open_images(archive(tmp_path / "x.npz", count=10))
    assert images.take(4).labels == (0, 2, 5, 7)
    assert images.take(4, "first").labels == (0, 1, 2, 3)
    assert images.take(40) is images
    with pytest.raises(DataError, match="0 images"):
        images.take(0)


# -- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_batches_come_in_order_again_and_again(tmp_path: Path, prefetch: int) -> None:
    images = open_images(archive(tmp_path / "x.npz", count=7))
    batches = ImageBatches(images, PLAIN, batch_size=2, prefetch=prefetch)
    assert len(batches) == 4
    for _ in range(2):
        assert [labels.tolist() for _, labels in batches] == [[0, 1], [2, 3], [4, 5], [6]]


def test_batches_may_be_left_early(tmp_path: Path) -> None:
    batches = open_batches(archive(tmp_path / "x.npz"), preprocessing="none", batch_size=1)
    assert next(iter(batches))[1].tolist() == [0]


def test_images_of_different_sizes_are_an_error_that_names_two(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", size=(9, 8))
    with pytest.raises(DataError, match=r"a\.png and .*b\.png have different sizes"):
        list(open_batches(tmp_path, preprocessing="none"))


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"this is text", b"\x89PNG\r\n\x1a\n damaged"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.png: cannot be read as an image"):
        list(open_batches(tmp_path, preprocessing="none"))


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    noise = numpy.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"cut\.jpg: cannot be read as an image"):
        list(open_batches(tmp_path, preprocessing="none"))


@pytest.mark.parametrize("name", ["notes.txt", "a/notes.txt"])
def test_another_file_in_the_folder_is_named(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "a" / "x.png")
    (tmp_path / name).write_text("notes")
    with pytest.raises(DataError, match=r"notes\.txt: "):
        open_images(tmp_path)


def test_an_image_smaller_than_the_crop_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: the image is 8 x 8 pixels, smaller than"):
        list(open_batches(tmp_path, preprocessing="imagenet_crop"))


def test_a_label_out_of_range_is_named(tmp_path: Path) -> None:
    images = open_images(labelled_folder(tmp_path, [0, 9, 10]))
    with pytest.raises(DataError, match=r"2\.png: label 10 is out of range: .* 10 classes, 0 to 9"):
        images.check_labels(10)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,label\nmissing.png,0", r"labels\.csv, line 2: there is no file 'missing\.png'"),
        ("file,label\n0.png,cat", r"label 'cat' of 0\.png is no integer"),
        ("file,class\n0.png,0", "no column label"),
        ("", "no column file or label"),
        ("file,label\n", "has no images"),
        ("file,label\n0.png", "label '' of"),
    ],
)
def test_a_wrong_label_table_is_an_error(tmp_path: Path, table: str, message: str) -> None:
    labelled_folder(tmp_path, [0])
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        open_images(tmp_path)


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no images"):
        open_images(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        open_images(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": numpy.zeros(1)}, "no array 'images'"),
        ({"images": numpy.zeros((2, 3, 4, 4), numpy.uint8)}, r"uint8\[2, 3, 4, 4\]"),
        ({"images": numpy.zeros((2, 4, 4, 3))}, "float64"),
        ({"images": numpy.zeros((0, 4, 4, 3), numpy.uint8)}, "has no images"),
        (
            {"images": numpy.zeros((2, 4, 4, 3), numpy.uint8), "labels": numpy.zeros(3, int)},
            "expected 2 integers",
        ),
    ],
)
def test_a_wrong_archive_is_an_error(
    tmp_path: Path, arrays: dict[str, numpy.ndarray], message: str
) -> None:
    numpy.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_images(tmp_path / "x.npz")


def test_a_file_that_is_no_archive_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(DataError, match=r"x\.npz: cannot be read as an \.npz archive"):
        open_images(tmp_path / "x.npz")


def test_the_data_folder_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXQUANT_DATA", str(tmp_path))
    assert data_root() == tmp_path
    monkeypatch.setenv("FXQUANT_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="not a folder"):
        data_root()
