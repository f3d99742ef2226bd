"""Write a model card: a README.md for a model hub, with figures from the record and the report."""

from __future__ import annotations

import re
from typing import Any

import yaml
from torch import nn

from secateur.common.formatting import milliseconds, number, percent
from secateur.common.inert import inert
from secateur.compat.training import name_on_hub
from secateur.errors import ArtefactError
from secateur.report import proofs
from secateur.report.markdown import escape
from secateur.report.report import Report
from secateur.targets.units.module_form.reading import configuration_fits
from secateur.targets.units.record import Record, record_of

TAGS = ("pruning", "model-compression", "secateur")
_TASKS = {
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
}
"""Endings of Transformers' class names, and the hub's name for their task."""


def model_card(
    small: nn.Module,
    report: Report | None = None,
    *,
    name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    dataset: str | None = None,
    own_code: bool = False,
) -> str:
    """Return a model card, ready to be written as README.md and pushed to a hub.

    All figures come from the model's record and from the report. What neither holds is left out.

    Args:
        small: A pruned model.
        report: ``result.report``. With it the card also has losses, accuracy, latency and the proof.
        name: The card's title. Default: the class's name.
        base_model: The dense model's name on the hub. Default: the name that Transformers loaded it from.
        license: The hub's identifier of the licence, for example ``apache-2.0``. The dense model's
            licence applies.
        dataset: The hub's name of the data set that the report's accuracy was measured on. The hub
            shows the accuracy only if this is given.
        own_code: Whether the folder has a modeling file, as `export` writes it with ``own_code=True``.

    Returns:
        Front matter between ``---`` lines, then Markdown.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
        >>> small = sc.apply(net, plan)
        >>> print(sc.model_card(small, license="apache-2.0")[:27])
        ---
        license: apache-2.0
        lib
    """
    title = name or f"{type(small).__name__}, pruned"
    base = base_model or _origin(small)
    front: dict[str, Any] = {
        "license": license,
        "library_name": _library(small),
        "pipeline_tag": _task(small),
    }
    front |= {"base_model": base, "tags": list(TAGS)}
    front["datasets"] = [dataset] if dataset and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset) else None
    front["model-index"] = _index(title, front["pipeline_tag"], report, dataset)
    known = {key: value for key, value in front.items() if value is not None}
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
    parts = [f"---\n{text}---", f"# {escape(title)}"]
    try:
        record = record_of(small)
    except ArtefactError:  # not pruned by secateur
        record = None
    origin = f" of {_linked(base)}" if base else ""
    what = "units" if record is None else _kind(record)
    parts.append(f"A smaller version{origin}, made by removing {what} with secateur.")
    if report is not None:
        parts.append(_measured(report, dataset))
    elif record is not None:
        parts.append(_counted(record))
    if record is not None:
        parts.append(_how(record))
    if report is not None and report.proof:
        parts.append(f"## Proof\n\n{escape(proofs.paragraph(report))}")
    parts.append(_loading(small, own_code))
    return inert("\n\n".join(parts) + "\n")


def _origin(small: nn.Module) -> str | None:
    """Return the name that Transformers loaded the dense model from, if it looks like a hub name."""
    found = name_on_hub(small)
    return found if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", found) else None


def _linked(base: str) -> str:
    """A link to a model on the hub, where the name is one of the hub's."""
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base):
        return f"[{escape(base)}](https://huggingface.co/{base})"
    return escape(base)


def _library(small: nn.Module) -> str:
    if hasattr(small, "save_pretrained"):
        return "transformers"
    return "timm" if type(small).__module__.startswith("timm.") else "pytorch"


def _task(small: nn.Module) -> str | None:
    kind = type(small).__name__
    return next((task for ending, task in _TASKS.items() if kind.endswith(ending)), None)


def _index(
    title: str, task: str | None, report: Report | None, dataset: str | None
) -> list[dict[str, Any]] | None:
    """Return the accuracy in the hub's format (``model-index``); None without an accuracy or data set."""
    if report is None or dataset is None or report.figures[-1].accuracy is None:
        return None
    metric = {"type": "accuracy", "value": round(report.figures[-1].accuracy, 6), "name": "top-1 accuracy"}
    result = {
        "task": {"type": task or "other"},
        "dataset": {"name": dataset, "type": dataset},
        "metrics": [metric],
    }
    return [{"name": title, "results": [result]}]


def _measured(report: Report, dataset: str | None) -> str:
    stages = report.figures
    dense = stages[0]
    rows = [
        ("parameters", *(_of(number(f.params), f.params, dense.params) for f in stages)),
        ("MACs for one sample", *(_of(number(f.macs), f.macs, dense.macs) for f in stages)),
        ("bytes of weights", *(f"{f.weight_bytes:,}" for f in stages)),
    ]
    if dense.accuracy is not None:
        rows.append(("top-1 accuracy", *(_percent(f.accuracy) for f in stages)))
    rows.append((dense.measure, *(f"{f.loss:.4f}" for f in stages)))
    if dense.latency is not None:
        rows.append(("latency", *("–" if f.latency is None else milliseconds(f.latency) for f in stages)))
    lines = [_row("", *(f.stage for f in stages)), _row("---", *("---:" for _ in stages))]
    lines += [_row(*row) for row in rows]
    judged = "Loss" if dense.accuracy is None else "Loss and accuracy"
    notes = [f"{judged} on {escape(dataset or report.judged_on)}, without training after pruning."]
    if dense.latency is not None:
        batch = f"a batch of {dense.latency_batch}"
        notes.append(f"Latency: the median forward pass of {batch} on the machine that pruned.")
    return "## Figures\n\n" + "\n".join(lines) + "\n\n" + " ".join(notes)


def _counted(record: Record) -> str:
    dense, small = record.plan.dense, record.plan.predicted
    lines = [_row("", "dense", "pruned"), _row("---", "---:", "---:")]
    for title, name in (("parameters", "params"), ("MACs for one sample", "macs")):
        before, after = getattr(dense, name), getattr(small, name)
        lines.append(_row(title, number(before), _of(number(after), after, before)))
    return "## Figures\n\n" + "\n".join(lines)


def _kind(record: Record) -> str:
    kinds = {
        "expert": "experts",
        "block": "blocks",
        "unit+block": "units and blocks",
        "unit+expert": "units and experts",
        "rank": "directions",
        "unit+rank": "units and directions",
    }
    return kinds.get(getattr(record.plan, "granularity", ""), "units")


def _how(record: Record) -> str:
    plan = record.plan
    groups = [g for g in plan.groups if g.removed]
    gone, units = sum(g.size - g.kept for g in groups), sum(g.size for g in plan.groups)
    lines = [
        f"- rule: {escape(plan.allocator)}, seed {plan.seed}",
        f"- {_kind(record)} removed: {gone:,} of {units:,}, in {len(groups)} of {len(plan.groups)} groups",
        f"- form: `{record.form}`" + (f" ({escape(record.note)})" if record.note else ""),
        f"- secateur {escape(plan.secateur)}",
    ]
    kept = [str(r["method"]) for r in record.repairs if r.get("kept") and "method" in r]
    if kept:
        lines.insert(2, f"- repaired by: {escape(', '.join(dict.fromkeys(kept)))}")
    if plan.budget:
        asked = ", ".join(f"{key} {value}" for key, value in plan.budget.items())
        lines.insert(1, f"- budget: {escape(asked)}")
    return "## How it was made\n\n" + "\n".join(lines)


def _loading(small: nn.Module, own_code: bool) -> str:
    if own_code:
        kind = next(
            (k for k in ("ForCausalLM", "ForSequenceClassification") if type(small).__name__.endswith(k)), ""
        )
        code = (
            f"from transformers import AutoModel{kind}\n\n"
            f'model = AutoModel{kind}.from_pretrained("this folder", trust_remote_code=True)'
        )
        note = "Its layers have sizes of their own, which `modeling_secateur.py` sets: read it first."
        return f"## How to load it\n\n{note}\n\n```python\n{code}\n```"
    if _library(small) == "transformers" and configuration_fits(small):
        kind = type(small).__name__
        code = f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("this folder")'
    else:
        code = 'import secateur as sc\n\nmodel = sc.load("this folder", make_model)  # makes the dense model'
    return f"## How to load it\n\n```python\n{code}\n```"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell if set(cell) <= set("-: ") else escape(cell) for cell in cells) + " |"


def _of(text: str, part: int, whole: int) -> str:
    return text if part == whole else f"{text} ({percent(part, whole)})"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"
