"""Ultralytics' YOLO: fresh from the configuration and used, with its own predictor, exporter and trainer."""

from __future__ import annotations

import copy
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.libraries.case import Case

CLASSES = 3


def _make(config: str) -> nn.Module:
    tasks: Any = import_module("ultralytics.nn.tasks")
    kinds = {"seg": tasks.SegmentationModel, "pose": tasks.PoseModel, "cls": tasks.ClassificationModel}
    kind = kinds.get(config.removesuffix(".yaml").split("-")[-1], tasks.DetectionModel)
    model: nn.Module = kind(config, ch=3, nc=CLASSES, verbose=False)
    return model


def _pictures(batch: int, size: Any) -> tuple[Tensor, ...]:
    return (torch.rand(batch, 3, *size),)


def wrapped(model: nn.Module, config: str) -> Any:
    """`model` inside the library's own `YOLO`, which predicts, exports and trains."""
    ultralytics: Any = import_module("ultralytics")
    yolo = ultralytics.YOLO(config, verbose=False)
    yolo.model = model
    model.args = yolo.overrides | {"imgsz": 64}
    model.names = {i: f"class {i}" for i in range(CLASSES)}
    return yolo


def predict(model: nn.Module, config: str) -> list[Tensor]:
    """What the predictor finds in a picture (it fuses batch norms into convolutions first)."""
    picture = torch.rand(1, 3, 64, 96)
    yolo = wrapped(copy.deepcopy(model), config)
    found = yolo.predict(
        picture, imgsz=(64, 96), conf=0.0, max_det=5, verbose=False, save=False, device="cpu"
    )
    return [result.probs.data if result.probs is not None else result.boxes.data for result in found]


def export_onnx(model: nn.Module, config: str) -> list[Tensor]:
    """What the exported file computes, loaded into ONNX Runtime."""
    onnxruntime: Any = import_module("onnxruntime")
    picture = torch.rand(1, 3, 64, 64)
    with tempfile.TemporaryDirectory() as folder:
        yolo = wrapped(copy.deepcopy(model), config)
        yolo.model.pt_path = yolo.model.yaml_file = str(Path(folder) / "small.pt")
        path = yolo.export(format="onnx", imgsz=64, simplify=False, verbose=False, device="cpu")
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        outputs = session.run(None, {session.get_inputs()[0].name: picture.numpy()})
    return [torch.from_numpy(output) for output in outputs]


def dataset(folder: Path) -> Path:
    """Random pictures with random boxes in the library's own layout; returns the file that describes it."""
    image: Any = import_module("PIL.Image")
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True)
        for index in range(4):
            pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
            image.fromarray(pixels).save(folder / "images" / part / f"{index}.png")
            centre, side = (torch.rand(2) * 0.4 + 0.3).tolist(), (torch.rand(2) * 0.3 + 0.2).tolist()
            values = " ".join(f"{value:.4f}" for value in (*centre, *side))
            (folder / "labels" / part / f"{index}.txt").write_text(f"{index % CLASSES} {values}\n")
    described = folder / "data.yaml"
    names = "\n".join(f"  {i}: class {i}" for i in range(CLASSES))
    described.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames:\n{names}\n")
    return described


def train(model: nn.Module, config: str) -> None:
    """One epoch with the library's own trainer, which must train this model and not a dense one."""
    trainers: Any = import_module("ultralytics.models.yolo.detect")

    class Trainer(trainers.DetectionTrainer):  # type: ignore[misc]
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
            return self.set_model_names_for_load(model)

    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with tempfile.TemporaryDirectory() as folder:
        data = dataset(Path(folder))
        yolo = import_module("ultralytics").YOLO(config, verbose=False)
        options = {
            "epochs": 1,
            "imgsz": 64,
            "batch": 2,
            "workers": 0,
            "device": "cpu",
            "plots": False,
            "amp": False,
            "verbose": False,
            "exist_ok": True,
            "warmup_epochs": 0,
            "lr0": 0.01,
            "optimizer": "SGD",
        }
        yolo.train(trainer=Trainer, data=str(data), project=folder, name="run", **options)
        trained = yolo.model
        again = import_module("ultralytics").YOLO(str(Path(folder) / "run" / "weights" / "last.pt"))
    for kind in (trained, again.model):
        if [tuple(parameter.shape) for parameter in kind.parameters()] != shapes:
            raise AssertionError("expected the trainer to train the pruned model, not a dense one.")
    if all(torch.equal(a.float(), b) for a, b in zip(trained.parameters(), before, strict=True)):
        raise AssertionError("expected an epoch of training to change the weights.")


def _uses(config: str, *, trained: bool) -> dict[str, Any]:
    uses: dict[str, Any] = {
        "predict": lambda model: predict(model, config),
        "export to ONNX": lambda model: export_onnx(model, config),
    }
    if trained:
        uses["an epoch with its own trainer"] = lambda model: train(model, config)
    return uses


def _case(config: str, *, fresh: bool = False, trained: bool = False) -> Case:
    name = config.removesuffix(".yaml") + (" (fresh)" if fresh else "")
    sizes = ((64, 64), (96, 64), (128, 160))
    uses = _uses(config, trained=trained)
    return Case(name, "ultralytics", lambda: _make(config), _pictures, sizes, uses=uses, fresh=fresh)


CASES = (
    _case("yolov8n.yaml", trained=True),
    _case("yolov8n.yaml", fresh=True),
    _case("yolo11n.yaml", trained=True),
    _case("yolo11n.yaml", fresh=True),
    _case("yolo26n.yaml", trained=True),
    _case("yolo26n.yaml", fresh=True),
    _case("yolo11n-seg.yaml"),
    _case("yolo11n-pose.yaml"),
    _case("yolo11n-cls.yaml"),
    _case("yolo12n.yaml"),
    _case("yolov5n.yaml"),
    _case("yolov9t.yaml"),
    _case("yolov10n.yaml"),
)
