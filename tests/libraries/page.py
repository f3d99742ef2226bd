"""The page of the documentation on models of other libraries: which can be pruned, and used afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "libraries.md"

Found = dict[str, Any]
"""What `tests.libraries.walk` found about one model."""

HEAD = """\
# Models of other libraries

The models below are made in tiny configurations with random weights. 30 % of the units of every group are
removed at random, and the pruned model is compared with the masked dense one in float64: at the traced size, at
other sizes, with other batch sizes. Then it takes a training step (outputs and gradients are compared), runs in
half precision, is saved and loaded, and does what its users do with it: generate, predict, a step of a pipeline,
the library's own trainer or exporter. `make test-libraries` installs the libraries into an environment of their
own and repeats all of it; this page is written by `python -m tests.libraries.run`.
"""

RECIPE = """\
## Training a pruned YOLO with its own trainer

Ultralytics' trainer builds the model anew from its yaml, which would be the dense one. A trainer whose
`get_model` returns the pruned model trains that one; the checkpoints it writes hold the pruned model and load
with `YOLO(path)` as usual.

```python
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

yolo = YOLO("yolo11n.pt")
graph = sc.trace(yolo.model.eval(), torch.rand(2, 3, 64, 64))
plan = ...  # any allocator
small = sc.apply(yolo.model, plan, graph=graph)


class Trainer(DetectionTrainer):
    def get_model(self, cfg=None, weights=None, verbose=True):
        return self.set_model_names_for_load(small)


yolo.train(trainer=Trainer, data="data.yaml", epochs=1, imgsz=64)
yolo.predict("picture.png")  # the trained, pruned model
```
"""


def usable(found: Found) -> bool:
    """Whether the pruned model runs at every size and batch size at which the dense one runs."""
    sizes = {t: what for t, what in found["checks"].items() if t.startswith("size ")}
    return bool(sizes) and all(what == "ok" or what.startswith("dense cannot") for what in sizes.values())


def wrong(found: Found) -> bool:
    """Whether a check computed something else than the masked dense model."""
    return any(what.startswith("WRONG") for what in found["checks"].values())


def page(cases: list[Found]) -> str:
    """The page."""
    plain = [c for c in cases if c["form"] == "module"]
    lines = [
        HEAD,
        f"Of {len(cases)} models, {_share(plain, cases)} come back as plain modules, "
        f"{_share(list(filter(usable, cases)), cases)} are usable at every size that the dense model takes, "
        f"and {len(list(filter(wrong, cases)))} differ from the masked dense model in some check.\n",
        "| model | library | form | groups | MACs left | sizes | training | half | saved | uses | what fails |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(_row, cases),
        "",
        RECIPE,
    ]
    return "\n".join(lines)


def _share(some: list[Found], cases: list[Found]) -> str:
    return f"{len(some)} ({100 * len(some) // max(len(cases), 1)} %)"


def _row(found: Found) -> str:
    others = {"verify", "training step", "half precision", "save and load", "prune"}
    uses = lambda title: not title.startswith("size ") and title not in others  # noqa: E731
    faults = [
        f"{t}: {w}" for t, w in found["checks"].items() if w != "ok" and not w.startswith("dense cannot")
    ]
    told = faults[0] if faults else found["note"]
    cells = (
        found["name"],
        found["library"],
        found["form"],
        found["groups"],
        f"{found['macs']:.2f}",
        _outcome(found, lambda title: title.startswith("size ")),
        _outcome(found, "training step".__eq__),
        _outcome(found, "half precision".__eq__),
        _outcome(found, "save and load".__eq__),
        _outcome(found, uses),
        told.replace("|", "/").replace("\n", " ").replace("<", "&lt;")[:160],
    )
    return f"| {' | '.join(map(str, cells))} |"


def _outcome(found: Found, belongs: Callable[[str], bool]) -> str:
    """The worst of the checks that belong together, in a word; empty if there are none."""
    results = [what for title, what in found["checks"].items() if belongs(title)]
    for word in ("WRONG", "crash", "refused"):
        if any(what.startswith(word) for what in results):
            return word
    if results and all(what.startswith("dense cannot") for what in results):
        return "dense cannot"
    return "ok" if results else ""
