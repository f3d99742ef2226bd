"""CIFAR and SVHN in the layouts that they are published in, and files that only pretend to be."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur.cli.loading import check_data, load_data
from secateur.cli.loading.archives import LAYOUTS, Archive
from secateur.cli.loading.cifar import batch_of
from secateur.cli.loading.matfile import matrices
from secateur.config.sections import ImagesSection
from secateur.errors import CalibrationError, SettingError
from tests.cli.conftest import refused, run


def images(count: int, seed: int) -> tuple[np.ndarray[Any, Any], list[int]]:
    generator = np.random.default_rng(seed)
    labels = [int(y) for y in generator.integers(0, 10, count)]
    return generator.integers(0, 256, (count, 3072), dtype=np.uint8), labels


class Python2(pickle._Pickler):
    """Writes bytes as the texts of Python 2, as the published files have them."""

    dispatch = pickle._Pickler.dispatch.copy()  # type: ignore[attr-defined]

    def save_text(self, content: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)  # type: ignore[attr-defined]
        self.memoize(content)  # type: ignore[attr-defined]

    dispatch[bytes] = save_text


def as_python_2(content: Any) -> bytes:
    """A pickle as Python 2 and its NumPy wrote it."""
    file = io.BytesIO()
    Python2(file, protocol=2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_cifar10(folder: Path, each: int = 6) -> tuple[np.ndarray[Any, Any], list[int]]:
    """What the archive holds, with fewer images; returns those of training."""
    there = folder / "cifar-10-batches-py"
    there.mkdir(parents=True)
    found = [images(each, k) for k in range(6)]
    for k, (pixels, labels) in enumerate(found):
        name = f"data_batch_{k + 1}" if k < 5 else "test_batch"
        names = [f"image_{i}.png".encode() for i in range(each)]
        content = {b"batch_label": b"x", b"labels": labels, b"data": pixels, b"filenames": names}
        (there / name).write_bytes(as_python_2(content))
    return np.concatenate([p for p, _ in found[:5]]), [y for _, ys in found[:5] for y in ys]


def gathered(data: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = zip(*data, strict=True)
    return torch.cat(inputs), torch.cat(labels)


def expected(pixels: np.ndarray[Any, Any], name: str, seed: int = 0) -> tuple[torch.Tensor, Any]:
    """By hand: shuffled, scaled, normalised."""
    order = np.random.default_rng(seed).permutation(len(pixels))
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (LAYOUTS[name].mean, LAYOUTS[name].std))
    return (torch.from_numpy(pixels[order].reshape(-1, 3, 32, 32) / 255.0).float() - mean) / std, order


def test_python_and_binary_batches_are_the_same_images(tmp_path: Path) -> None:
    pixels, labels = write_cifar10(tmp_path / "py")
    rows = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], 1)
    (tmp_path / "bin").mkdir()
    for k in range(5):
        (tmp_path / "bin" / f"data_batch_{k + 1}.bin").write_bytes(rows[6 * k : 6 * k + 6].tobytes())
    wanted, order = expected(pixels, "cifar10")
    for text in (
        f"cifar10:{tmp_path}/py",
        f"cifar10:{tmp_path}/py/cifar-10-batches-py",
        f"cifar10:{tmp_path}/bin",
    ):
        check_data("--data", text)
        x, y = gathered(load_data("--data", text, batch_size=7))
        torch.testing.assert_close(x, wanted)
        assert y.tolist() == [labels[i] for i in order]
    x, y = gathered(load_data("--data", f"cifar10-test:{tmp_path}/py", samples=4))
    assert (tuple(x.shape), len(y)) == ((4, 3, 32, 32), 4)


def test_a_hundred_classes_are_the_fine_ones(tmp_path: Path) -> None:
    pixels, labels = images(5, 1)
    content = {b"fine_labels": labels, b"coarse_labels": [0] * 5, b"data": pixels}
    (tmp_path / "train").write_bytes(pickle.dumps(content, protocol=4))
    _, order = expected(pixels, "cifar100")
    assert gathered(load_data("--data", f"cifar100:{tmp_path}"))[1].tolist() == [labels[i] for i in order]
    rows = np.concatenate([np.zeros((5, 1), np.uint8), np.array(labels, np.uint8)[:, None], pixels], 1)
    (tmp_path / "test.bin").write_bytes(rows.tobytes())
    found = gathered(load_data("--data", f"cifar100-test:{tmp_path}"))
    assert found[1].tolist() == [labels[i] for i in order]
    torch.testing.assert_close(found[0], expected(pixels, "cifar100")[0])


@pytest.mark.parametrize("compressed", [True, False])
def test_house_numbers_as_scipy_writes_them(tmp_path: Path, compressed: bool) -> None:
    scipy = pytest.importorskip("scipy.io")
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (32, 32, 3, 6), dtype=np.uint8)
    y = np.array([[1.0], [10.0], [3.0], [10.0], [9.0], [2.0]])
    file = tmp_path / "train_32x32.mat"
    scipy.savemat(file, {"other": np.zeros(3), "X": x, "y": y}, do_compression=compressed)
    found = matrices(file.read_bytes(), ("X", "y"), "here")
    np.testing.assert_array_equal(found["X"], scipy.loadmat(file)["X"])
    np.testing.assert_array_equal(found["y"], y)
    pixels = x.transpose(3, 2, 0, 1).reshape(6, -1)
    wanted, order = expected(pixels, "svhn")
    inputs, labels = gathered(load_data("--data", f"svhn:{tmp_path}"))
    torch.testing.assert_close(inputs, wanted)
    assert labels.tolist() == [[1, 0, 3, 0, 9, 2][i] for i in order]
    with pytest.raises(CalibrationError, match="got no z"):
        matrices(file.read_bytes(), ("X", "z"), "here")


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("made",)


def test_a_pickle_that_names_anything_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pixels, labels = images(5, 1)

    def read(content: Any) -> None:
        raw = content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
        (tmp_path / "train").write_bytes(raw)
        load_data("--data", f"cifar100:{tmp_path}")

    whole = {b"fine_labels": labels, b"data": pixels}
    read(whole)
    with pytest.raises(CalibrationError, match=r"got a pickle that asks for posix\.mkdir|nt\.mkdir"):
        read(whole | {b"extra": Evil()})
    assert not (tmp_path / "made").exists()
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "made").exists()  # so the file above could have made it
    with pytest.raises(CalibrationError, match="array that is not of bytes"):
        read(whole | {b"data": pixels.astype(np.int64)})
    with pytest.raises(CalibrationError, match="no rows of 3,072 bytes"):
        read(whole | {b"data": pixels[:, :9]})
    with pytest.raises(CalibrationError, match="not of bytes"):
        read(whole | {b"data": np.array([1], object)})
    with pytest.raises(CalibrationError, match="expected 5 classes from 0"):
        read(whole | {b"fine_labels": labels[:4]})
    with pytest.raises(CalibrationError, match="expected 5 classes from 0"):
        read(whole | {b"fine_labels": [-1] * 5})
    with pytest.raises(CalibrationError, match="expected the entries data and fine_labels, got 'data'"):
        read({b"data": pixels})
    with pytest.raises(CalibrationError, match="got a list"):
        read([1, 2])
    with pytest.raises(CalibrationError, match="a damaged file"):
        read(pickle.dumps(whole, protocol=2)[:-50])
    with pytest.raises(CalibrationError, match="a damaged file"):
        read(b"\x80\x02r\xff\xff\xff\x7f.")  # a memo of two thousand million places

    class Elsewhere(pickle.Pickler):
        def persistent_id(self, thing: object) -> str | None:
            return "x" if thing is pixels else None

    persistent = io.BytesIO()
    Elsewhere(persistent, protocol=2).dump(whole)
    with pytest.raises(CalibrationError, match="what is outside of it"):
        read(persistent.getvalue())


def _key(key: bytes) -> bytes:
    return b"\x80\x02}" + key + b"K\x01s."


def _array(shape: bytes) -> bytes:
    made = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01" + shape
    return (
        b"\x80\x02}X\x04\x00\x00\x00data" + made + b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R\x89C\x03abctbs."
    )


def _text(content: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(content)) + content


ENCODED = b"c_codecs\nencode\nq\x01" + _text(b"a" * 1000) + _text(b"latin1") + b"\x86q\x02R"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (_key(b")" + b"\x85" * 10**6), "keys are no texts"),  # its hash takes all of the stack
        (_key(b")" + b"2\x86" * 60), "keys are no texts"),  # and this one's takes for ever
        (b"\x80\x02()" + b"2\x86" * 60 + b"K\x01d.", "keys are no texts"),
        (b"\x80\x02}()" + b"2\x86" * 60 + b"K\x01u.", "keys are no texts"),
        (b"\x80\x04\x8f()" + b"2\x86" * 60 + b"\x90.", "a pickle with a set"),
        (pickle.dumps({10**5000: 1}, 2), "keys are no texts"),
        (_array(_text(b"a" * 10**6) + b"K\x01\x86"), "no rows of 3,072 bytes"),  # times 3,072
        (b"\x80\x02}" + ENCODED + b"h\x01h\x02R" * 300 + b".", "more bytes than it holds"),
        (b"\x80\x02" + b"(" * 2_100_000 + b".", "more than 2,000,000 steps"),
        (b"\x80\x02c_codecs\nencode\n}b.", "changes what is no array"),
    ],
)
def test_a_small_pickle_takes_little_time_and_memory(content: bytes, match: str) -> None:
    with pytest.raises(CalibrationError, match=match) as caught:
        batch_of(content, "labels", "--data f")
    assert len(str(caught.value)) < 600


def test_names_in_messages_are_without_control_characters() -> None:
    with pytest.raises(CalibrationError, match="got '") as caught:
        batch_of(pickle.dumps({"\x1b[31m\n": 1}, 2), "labels", "--data f")
    assert str(caught.value).isprintable()


def _mat(*parts: tuple[int, bytes]) -> bytes:
    """An array of a MAT file, without the file's header."""
    body = b"".join(struct.pack("<II", kind, len(c)) + c + bytes(-len(c) % 8) for kind, c in parts)
    return struct.pack("<II", 14, len(body)) + body


def test_a_small_mat_file_takes_little_memory() -> None:
    head = bytes(124) + b"\0\1IM"
    many = _mat((6, bytes(8)), (5, b"\xff\xff\xff\x7f" * 10**6), (1, b"X"), (2, b""))
    with pytest.raises(CalibrationError, match="X with 1,000,000 axes"):
        matrices(head + many, ("X",), "--data f")
    packed = zlib.compress(struct.pack("<II", 14, 1 << 30))
    with pytest.raises(CalibrationError, match="an array of 1,073,741,824 bytes packed"):
        matrices(head + struct.pack("<II", 15, len(packed)) + packed, ("X",), "--data f")


def test_digits_that_are_no_numbers_and_files_without_images_are_refused(tmp_path: Path) -> None:
    for digits, match in (
        ([float("nan"), 1.0], "expected digits from 1 to 10"),
        ([], "expected images, got none"),
    ):
        pixels = bytes(3072 * len(digits))
        x = _mat((6, bytes(8)), (5, struct.pack("<4i", 32, 32, 3, len(digits))), (1, b"X"), (2, pixels))
        shape, y = struct.pack("<2i", len(digits), 1), struct.pack(f"<{len(digits)}d", *digits)
        y = _mat((6, bytes(8)), (5, shape), (1, b"y"), (9, y))
        (tmp_path / "train_32x32.mat").write_bytes(bytes(124) + b"\0\1IM" + x + y)
        with pytest.raises(CalibrationError, match=match):
            Archive("--data", "svhn", False, tmp_path).read()


def test_damaged_rows_and_matrices_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"\0" * 3075)
    with pytest.raises(CalibrationError, match="expected rows of 3,074 bytes, got 3,075"):
        load_data("--data", f"cifar100:{tmp_path}")
    header = b"MATLAB 5.0".ljust(124) + b"\0\1IM"
    packed = zlib.compress((14).to_bytes(4, "little") + b"\xff\xff\xff\xff" + b"\0" * 100)
    bomb = header + (15).to_bytes(4, "little") + len(packed).to_bytes(4, "little") + packed
    (tmp_path / "train_32x32.mat").write_bytes(header)
    with pytest.raises(CalibrationError, match="expected the arrays X, y, got no X"):
        load_data("--data", f"svhn:{tmp_path}")
    for raw in (b"", b"\0" * 200, header + b"\x0e\0\0\0\xff\0\0\0", bomb):
        (tmp_path / "train_32x32.mat").write_bytes(raw)
        with pytest.raises(CalibrationError, match="MATLAB's version 5"):
            load_data("--data", f"svhn:{tmp_path}")


def test_where_nothing_lies_it_says_what_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match="a folder with cifar-10-batches-py/test_batch"):
        check_data("--data", f"cifar10-test:{tmp_path}")
    with pytest.raises(CalibrationError, match=r"a folder with train_32x32\.mat"):
        check_data("--data", "svhn:no/where")
    assert Archive.of("--data", "cifar10:load") is None  # a function in the user's cifar10.py
    assert Archive.of("--data", "mnist:there/x") is None


def test_the_loader_says_which_files_it_reads(tmp_path: Path) -> None:
    write_cifar10(tmp_path)

    def said() -> Any:
        return load_data("--data", f"cifar10:{tmp_path}").dataset.content

    first = said()
    assert said() == first
    file = tmp_path / "cifar-10-batches-py" / "data_batch_5"
    os.utime(file, (0, 0))
    assert said() != first


def test_sizes_and_statistics_may_be_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    write_cifar10(tmp_path)
    text = f"cifar10:{tmp_path}"
    asked = ImagesSection(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    x, _ = gathered(load_data("--data", text, images=asked))
    assert float(x.min()) >= 0
    assert float(x.max()) <= 1
    x, _ = gathered(load_data("--data", text, images=ImagesSection(size=16)))
    assert tuple(x.shape[1:]) == (3, 16, 16)
    with pytest.raises(SettingError, match="three channels, got 1"):
        load_data("--data", text, images=ImagesSection(mean=(0.5,), std=(0.5,)))


def test_the_command_line_prunes_with_them(folder: Path) -> None:
    write_cifar10(folder / "data", each=12)
    done = run(
        "prune", "--model", "net.py:make", "--data", "cifar10:data", "--evaluation", "cifar10-test:data",
        "--macs", "0.6", "--allocator", "uniform", "--removal", "magnitude", "--repair", "none",
        "--out", "small", "--set", "batch_size=10",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "label" in done.stderr  # the network has three classes, the data ten
    said = refused(2, "prune", "--model", "net.py:make", "--data", "svhn:data", "--out", "small")
    assert "train_32x32.mat" in said
