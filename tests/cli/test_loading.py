"""Models and data of every kind that a command line may name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.cli.loading import check_data, check_model, load_data, load_model, model_source
from secateur.config.sections import ImagesSection, TextSection
from secateur.errors import CalibrationError, SettingError
from tests.cli.conftest import refused, run
from tests.zoo.importing import import_timm, import_transformers

TIMM = "timm:resnet10t,num_classes=3,in_chans=1"


def small_llama(folder: Path) -> nn.Module:
    transformers = import_transformers()
    if transformers is None:
        pytest.skip("Transformers is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)  # type: ignore[operator]
    words = {f"w{i}": i for i in range(1, 30)}
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, **words}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    fast.save_pretrained(folder)
    return model


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "pictures" / name / "more").mkdir(parents=True)
        for i in range(6):
            pixels = generator.integers(0, 90, (20 + i, 30, 3), dtype=np.uint8) + 80 * label
            image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "pictures" / name / "more" / f"{i}.png")
        (tmp_path / "pictures" / name / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def scope_of(code: str) -> dict[str, Any]:
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope


def test_a_model_of_timm_from_a_checkpoint(folder: Path) -> None:
    timm = import_timm()
    if timm is None:
        pytest.skip("timm is not installed")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    own = timm.create_model("resnet10t", num_classes=3, in_chans=1).eval()
    save_file(own.state_dict(), folder / "own.safetensors")
    torch.save({"state_dict": own.state_dict()}, folder / "own.pth")
    for file in ("own.safetensors", "own.pth"):
        source = model_source("--model", f"{TIMM},checkpoint_path={file}")
        loaded = source.load()
        assert all(
            torch.equal(a, b)
            for a, b in zip(own.state_dict().values(), loaded.state_dict().values(), strict=True)
        )
        made = scope_of(source.import_line)["make_model"]()
        assert [p.shape for p in made.parameters()] == [p.shape for p in own.parameters()]
    result = run("inspect", "--model", TIMM, "--input", "1x1x32x32", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["model"] == "ResNet"
    plain = model_source("--model", f"{TIMM},pretrained=False").load()
    assert not plain.training


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("timm:no_such_model", "expected a model that timm.create_model\\('no_such_model'\\) makes"),
        (f"{TIMM},checkpoint_path=none.pth", "expected weights of resnet10t in none.pth"),
    ],
)
def test_what_timm_refuses_is_one_of_our_errors(text: str, said: str) -> None:
    if import_timm() is None:
        pytest.skip("timm is not installed")
    with pytest.raises(SettingError, match=said):
        model_source("--model", text).load()


# torch warns of its own internals when an exported program is copied.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_an_exported_program_is_pruned_and_loaded_again(folder: Path) -> None:
    scope = scope_of((folder / "net.py").read_text())
    images = torch.randn(4, 3, 6, 6)
    batch = torch.export.Dim("batch")
    program = torch.export.export(scope["make"](), (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "net.pt2")
    arguments = ("--model", "net.pt2", "--data", "x.npz", "--macs", "0.5", "--out", "small", "--json")
    result = run("prune", *arguments)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["figures"][1]["macs"] <= 0.5 * report["figures"][0]["macs"]
    source = model_source("--model", "net.pt2")
    small = sc.load(folder / "small", scope_of(source.import_line)["make_model"])
    assert sum(p.numel() for p in small.parameters()) == report["figures"][1]["params"]
    assert small(images).shape == (4, 3)


def test_the_weights_of_a_hugging_face_folder_may_stay_in_its_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.common import mapped

    monkeypatch.setattr(mapped, "SMALL", 0)
    model = small_llama(folder / "llama")
    loaded, make = load_model(model_source("--model", "mapped:llama"))
    assert all(mapped.is_mapped(parameter) for parameter in loaded.parameters())
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert not any(mapped.is_mapped(parameter) for parameter in make().parameters())
    with pytest.raises(SettingError, match="expected a Hugging Face folder after 'mapped:', got none"):
        model_source("--model", "mapped:nowhere")


def test_a_hugging_face_folder_and_a_text(folder: Path) -> None:
    model = small_llama(folder / "llama")
    source = model_source("--model", "llama")
    loaded, make = load_model(source)
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert type(make()) is type(scope_of(source.import_line)["make_model"]()) is type(model)
    words = [f"w{i % 29 + 1}" for i in range(100)]
    (folder / "text.txt").write_text(" ".join(words))
    data = load_data("--data", "text.txt", batch_size=4, texts=TextSection(length=8), source=source)
    batches = list(data)
    pieces = torch.cat([batch["input_ids"] for batch in batches])
    assert pieces.shape == (12, 8)  # of a hundred, four are left over
    assert sorted(pieces.flatten().tolist()) == sorted(i % 29 + 1 for i in range(96))
    assert all(torch.equal(b["labels"], b["input_ids"]) and bool(b["attention_mask"].all()) for b in batches)
    few = load_data("--data", "text.txt", samples=5, texts=TextSection(length=8), source=source)
    assert sum(len(batch["input_ids"]) for batch in few) == 5
    arguments = ("--model", "llama", "--data", "text.txt", "--text-length", "8", "--batch-size", "4")
    rule = ("--allocator", "uniform", "--removal", "l2", "--macs", "0.8", "--out", "small", "--json")
    result = run("prune", *arguments, *rule)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["figures"][1]["macs"] <= 0.8 * report["figures"][0]["macs"]
    assert isinstance(sc.load("small", scope_of(source.import_line)["make_model"]), nn.Module)
    with pytest.raises(SettingError, match="expected a tokenizer for text"):
        load_data("--data", "text.txt", source=model_source("--model", "net.py:make"))


def test_a_folder_of_pictures(folder: Path, pictures: Path) -> None:
    images = ImagesSection(size=16, mean=(0.5,), std=(0.25,))
    loader = load_data("--data", "pictures", batch_size=4, images=images)
    found = [(pixels, labels) for pixels, labels in loader]
    labels = torch.cat([labels for _, labels in found])
    pixels = torch.cat([pixels for pixels, _ in found])
    assert pixels.shape == (18, 1, 16, 16)
    assert sorted(labels.tolist()) == [0] * 6 + [1] * 6 + [2] * 6
    assert labels.tolist() != sorted(labels.tolist())  # drawn, not by class
    means = [float(pixels[labels == label].mean()) for label in range(3)]
    assert means == sorted(means)  # the brighter the later the class
    again = torch.cat([pixels for pixels, _ in load_data("--data", "pictures", batch_size=9, images=images)])
    assert torch.equal(pixels, again)
    few = load_data("--data", "pictures", images=images, samples=7, seed=1)
    assert sum(len(labels) for _, labels in few) == 7
    arguments = ("--model", "net.py:make", "--data", "pictures", "--image-size", "16", "--batch-size", "6")
    result = run("prune", *arguments, "--macs", "0.5", "--out", "small")
    assert result.exit_code == 0, result.stderr


def test_a_picture_that_unpacks_to_gigabytes_is_refused(folder: Path) -> None:
    from PIL import Image

    (folder / "many" / "class").mkdir(parents=True)
    Image.new("1", (1 << 14, 5 << 10)).save(folder / "many" / "class" / "a.png")  # 84 million, in 14 KB
    with pytest.raises(SettingError, match=r"a\.png: expected at most 67,108,864 pixels, got 16,384 x 5,120"):
        next(iter(load_data("--data", "many")))


def test_a_picture_is_scaled_cut_and_normalised(pictures: Path) -> None:
    from PIL import Image

    from secateur.cli.loading.pictures import Centred

    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, 20:60] = 255  # the middle square
    found = Centred(8, (0.5, 0.5, 0.5), (0.25, 0.5, 1.0), crop=1.0)(Image.fromarray(pixels))
    assert found.shape == (3, 8, 8)
    inner = found[:, 2:6, 2:6]
    assert torch.allclose(inner, torch.tensor([2.0, 1.0, 0.5])[:, None, None].expand_as(inner), atol=0.05)


def test_timm_says_how_its_pictures_are_made(pictures: Path) -> None:
    if import_timm() is None:
        pytest.skip("timm is not installed")
    from secateur.cli.loading.pictures import Centred, preparation

    prepare = preparation("--data", ImagesSection(), model_source("--model", "timm:resnet10t"))
    assert isinstance(prepare, Centred)
    assert (prepare.size, prepare.mean) == (176, (0.485, 0.456, 0.406))
    prepare = preparation("--data", ImagesSection(size=32), model_source("--model", "timm:resnet10t"))
    assert isinstance(prepare, Centred)
    assert prepare.size == 32


def test_a_hugging_face_dataset_without_its_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (folder / "rows").mkdir()
    (folder / "rows" / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SettingError, match="Run pip install datasets"):
        load_data("--data", "rows")
    (folder / "splits" / "train").mkdir(parents=True)
    (folder / "splits" / "dataset_dict.json").write_text("{}")
    (folder / "splits" / "train" / "state.json").write_text("{}")
    with pytest.raises(SettingError, match=r"got train\. Name one: splits/train"):
        load_data("--data", "splits")


# The library opens files that it does not close.
@pytest.mark.filterwarnings("ignore")
def test_hugging_face_datasets(folder: Path, pictures: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    def batches(columns: dict[str, Any], **settings: Any) -> list[Any]:
        name = f"rows{len(list(folder.iterdir()))}"
        datasets.Dataset.from_dict(columns).save_to_disk(folder / name)
        return list(load_data("--data", name, batch_size=3, **settings))

    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    found = batches({"x": values.tolist(), "label": [0, 1, 2, 0, 1, 2]})
    assert [tuple(x.shape) for x, _ in found] == [(3, 4), (3, 4)]
    rows = torch.cat([torch.cat([x, y[:, None]], 1) for x, y in found])
    assert sorted(rows.tolist()) == [[*row, float(i % 3)] for i, row in enumerate(values.tolist())]

    found = batches({"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 0]], "labels": [1, 0]})
    assert found[0].keys() == {"input_ids", "attention_mask", "labels"}
    assert sorted(found[0]["input_ids"].tolist()) == [[1, 2], [3, 4]]

    shown = [Image.open(path) for path in sorted(pictures.rglob("*.png"))[:4]]
    columns = datasets.Dataset.from_dict(
        {"image": shown, "label": [0, 1, 0, 1]},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
        ),
    )
    columns.save_to_disk(folder / "shown")
    (images, labels), *_ = load_data("--data", "shown", batch_size=4, images=ImagesSection(size=8))
    assert images.shape == (4, 3, 8, 8)
    assert sorted(labels.tolist()) == [0, 0, 1, 1]

    small_llama(folder / "llama")
    source, texts = model_source("--model", "llama"), TextSection(length=4)
    found = batches({"text": ["w1 w2", "w3 w4 w5 w6 w7"], "label": [1, 0]}, source=source, texts=texts)
    by_label = {
        int(y): ids.tolist() for ids, y in zip(found[0]["input_ids"], found[0]["labels"], strict=True)
    }
    assert by_label == {1: [1, 2, 0, 0], 0: [3, 4, 5, 6]}
    found = batches({"text": ["w1 w2", "w3 w4 w5 w6 w7"]}, source=source, texts=texts)
    assert found[0]["input_ids"].tolist() == [[1, 2, 3, 4]]
    with pytest.raises(CalibrationError, match="expected a column of pictures, text, input_ids"):
        batches({"other": [1.0, 2.0]})


@pytest.mark.parametrize(
    ("make", "text", "said"),
    [
        (None, "net", "got no function after a colon"),
        (None, "net.pt2", "expected an exported program, got no file"),
        (None, "timm:resnet18,ten", "expected name=value after a comma, got 'ten'"),
        ("plain", "plain", "expected a Hugging Face folder, got one without config.json"),
    ],
)
def test_what_names_no_model(folder: Path, make: str | None, text: str, said: str) -> None:
    if make is not None:
        (folder / make).mkdir()
    with pytest.raises(SettingError, match=said):
        check_model("--model", text)


def test_what_names_no_data(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "bare" / "class").mkdir(parents=True)
    with pytest.raises(CalibrationError, match="got no folder in it"):
        check_data("--data", "empty")
    with pytest.raises(CalibrationError, match="expected images"):
        load_data("--data", "bare")
    with pytest.raises(CalibrationError, match="expected a file, got none"):
        check_data("--data", "none.txt")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{}")
    with pytest.raises(SettingError, match=r"expected a config\.json with architectures"):
        model_source("--model", "broken").load()
    (folder / "net.pt2").write_text("nothing")
    assert "net.pt2: expected an exported program, got" in refused(
        2, "inspect", "--model", "net.pt2", "--input", "1x3x6x6"
    )


def test_at_most_so_many_samples(folder: Path) -> None:
    batches = load_data("--data", "x.npz", batch_size=10, samples=25)
    assert [len(x) for x, _ in batches] == [10, 10, 5]
    whole = load_data("--data", "x.npz", batch_size=72)
    assert torch.equal(torch.cat([x for x, _ in batches]), whole[0][0][:25])
