"""`secateur prune`, and its steps one by one: `score`, `plan`, `apply`, `repair`."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.artefact.pair import folder_in_place
from secateur.cli.command import BUDGET, LIMITS, READING, RULE, command
from secateur.cli.inputs import (
    Inputs,
    budget_of,
    limits_of,
    read_plan,
    repairs_of,
    rule_called,
    rule_of,
    single_rule_of,
)
from secateur.cli.output import (
    file_to_write,
    folder_to_write,
    reload_code,
    write_result,
    written,
)
from secateur.config.run import Run
from secateur.errors import SettingError

if TYPE_CHECKING:
    from secateur.pipeline.result import Result
    from secateur.signals import Scores


@command(
    "model",
    "data",
    "input",
    "scores",
    "granularity",
    "signals",
    *RULE,
    "checkpoint",
    "memory",
    "allow_inexact",
    *READING,
    "seed",
    needs=("model", "scores"),
    names={"scores": "out"},
)
def score(run: Run, json: bool) -> str:
    """Score every unit and write the table. A fifth of the data is held out, as `prune` does it."""
    out = file_to_write("--out", Path(run.scores or ""))
    import secateur as sc

    inputs = Inputs(run)
    signals = run.signals or rule_called(run, run.single_rule).signals
    scores = sc.score(
        inputs.graph,
        None if run.data is None else inputs.data.split()[0],
        signals,
        seed=run.seed,
        memory=run.memory,
        checkpoint=run.checkpoint,
    )
    scores.save(out)
    found = _score_summary(scores, out)
    return json_format.dumps(found, indent=1) if json else _score_table(found)


def _score_summary(scores: Scores, out: Path) -> dict[str, Any]:
    """Return the table of scores as plain data: lowest, median and highest score per signal and group."""
    import numpy as np

    return {
        "written": out.as_posix(),
        "samples": scores.samples,
        "classes": scores.classes,
        "seed": scores.seed,
        "signals": {
            signal: [
                {
                    "group": group,
                    "units": len(values),
                    "least": float(values.min()),
                    "median": float(np.median(values)),
                    "most": float(values.max()),
                }
                for group, values in scores[signal].items()
            ]
            for signal in scores.signals
        },
    }


def _score_table(found: dict[str, Any]) -> str:
    """Format the result of `_score_summary` as a table for a terminal."""
    rows = [(signal, each) for signal, groups in found["signals"].items() for each in groups]
    first = max(len(name) for name in ("signal", *found["signals"]))
    second = max(len(name) for name in ("group", *(each["group"] for _, each in rows)))
    head = f"{'signal':{first}}  {'group':{second}}  {'units':>6}" + "".join(
        f"  {name:>10}" for name in ("least", "median", "most")
    )
    lines = [
        f"{signal:{first}}  {each['group']:{second}}  {each['units']:>6,}  "
        + "  ".join(f"{each[name]:>10.4g}" for name in ("least", "median", "most"))
        for signal, each in rows
    ]
    classes = f" of {found['classes']} classes" if found["classes"] else ""
    about = f"{found['samples']:,} samples{classes} read; higher is worth more"
    return "\n".join([head, *lines, "", about, f"written to  {found['written']}"])


@command(
    "model",
    "scores",
    "plan",
    "data",
    "input",
    "granularity",
    *BUDGET,
    "budget.sparsity",
    "budget.experts",
    "budget.blocks",
    *RULE,
    *LIMITS,
    "allow_inexact",
    *READING,
    "seed",
    needs=("model", "scores", "plan"),
    names={"plan": "out"},
)
def plan(run: Run, json: bool) -> str:
    """Write a plan made from a table of scores, without scoring again; data serve as example inputs."""
    out = file_to_write("--out", Path(run.plan or ""))
    import secateur as sc
    from secateur.pipeline.options import TARGETS

    rule: Any = single_rule_of(run)
    scores = sc.Scores.load(run.scores or "")
    inputs = Inputs(run)
    fit = None if run.data is None else inputs.data.split()[0]
    rule = TARGETS[run.granularity].with_curves(rule, inputs.graph, fit, scores, progress=True)
    decided: sc.Plan | sc.MaskPlan = rule.allocate(
        inputs.graph, scores, budget_of(run), limits_of(run), run.seed
    )
    if isinstance(decided, sc.MaskPlan):
        decided.save(out)
    else:
        decided.to_json(out)
    return decided.to_json().rstrip() if json else f"{decided}\n\nwritten to  {out}"


@command(
    "model",
    "plan",
    "artefact",
    "data",
    "input",
    "form",
    "on_unrealisable",
    *READING,
    "seed",
    needs=("model", "plan", "artefact"),
    names={"artefact": "out"},
)
def apply(run: Run, json: bool) -> str:
    """Carry out a plan, prove the result and save it, unrepaired."""
    out = folder_to_write(Path(run.artefact or ""))
    import secateur as sc
    from secateur.report.proofs import described
    from secateur.targets.lowrank.opened import GRANULARITIES as RANKS

    decided = read_plan(run.plan or "")
    inputs = Inputs(run)
    graph, example = None, inputs.example if run.input or run.data else None
    model = inputs.model
    if decided.granularity in RANKS:  # a plan step by step is about the directions of the weights alone
        model = sc.factorise(model)
    if isinstance(decided, sc.MaskPlan):  # compared bit for bit, but the artefact says which inputs it takes
        graph, example = sc.trace(inputs.model, inputs.example, allow_inexact=True), None
    small = sc.apply(
        model,
        decided,
        run.form,
        example_inputs=example,
        graph=graph,
        on_unrealisable=run.on_unrealisable or "graph",
    )
    done = sc.record_of(small)
    dense, pruned = done.plan.dense, done.plan.predicted
    if isinstance(decided, sc.MaskPlan):
        pruned = dense.model_copy(update={"params": dense.params - decided.removed})
    else:  # the record's plan leaves out what the form could not express
        decided = done.plan
    proof = sc.verify(model, small, decided, example)
    with folder_in_place(out) as folder:
        sc.save(small, folder)
    if json:
        found = {
            "artefact": out.as_posix(),
            "form": done.form,
            "note": done.note,
            "takes": done.takes,
            "proof": asdict(proof),
            "dense": dense.model_dump(),
            "pruned": pruned.model_dump(),
        }
        return json_format.dumps(found, indent=1)
    parts = [
        str(decided),
        f"form {done.form}" + (f": {done.note}" if done.note else ""),
        f"proof: {described(asdict(proof))}",
        f"sizes of the inputs: {done.takes}",
        written(out, reload_code(inputs.source.import_line, out)),
    ]
    return "\n\n".join(parts)


@command(
    "model",
    "data",
    "input",
    "artefact",
    *BUDGET,
    "budget.sparsity",
    "budget.experts",
    "budget.blocks",
    "budget.accuracy_drop",
    "budget.loss_rise",
    "budget.perplexity_rise",
    "budget.latency",
    "budget.memory",
    "budget.tokens",
    "budget.backend",
    "granularity",
    *RULE,
    "parts",
    "steps",
    "repair",
    "polish_passes",
    *LIMITS,
    "allow_inexact",
    "form",
    "on_unrealisable",
    "evaluation",
    "held_out",
    "frontier",
    "quantise",
    "checkpoint",
    *READING,
    "seed",
    needs=("model", "artefact"),
    names={
        "artefact": "out",
        "budget.accuracy_drop": "max_drop",
        "budget.loss_rise": "max_loss_rise",
        "budget.perplexity_rise": "max_perplexity_rise",
        "budget.latency": "max_latency",
        "budget.memory": "max_memory",
    },
)
def prune(run: Run, json: bool) -> str:
    """Run the whole pipeline and write the smaller model with its reports."""
    out = folder_to_write(Path(run.artefact or ""))
    from secateur.report.text import table
    from secateur.signals.journal import discard

    inputs = Inputs(run)
    if run.data is None:
        from secateur.cli.dataless import prune_without_data

        result = prune_without_data(run, inputs)
    else:
        result = _with_data(run, inputs)
    reload = reload_code(inputs.source.import_line, out)
    report = write_result(
        result.model,
        result.report,
        out,
        reload,
        make_model=inputs.source.import_line,
        quantised=result.quantised,
    )
    if run.checkpoint is not None:
        discard(run.checkpoint)
    return report.to_json().rstrip() if json else table(report, reload=reload)


def _with_data(run: Run, inputs: Inputs) -> Result:
    import secateur as sc

    return sc.prune(
        inputs.model,
        inputs.data,
        budget_of(run),
        rule_of(run),
        run.granularity,
        repair=repairs_of(run),
        limits=limits_of(run),
        steps=run.steps,
        form=run.form,
        on_unrealisable=run.on_unrealisable or "leave",
        evaluation=inputs.evaluation,
        held_out=inputs.held_out,
        frontier=run.frontier or None,
        quantise=run.quantise,
        allow_inexact=run.allow_inexact,
        checkpoint=run.checkpoint,
        seed=run.seed,
    )


@command(
    "artefact",
    "model",
    "data",
    "repaired",
    "repair",
    "polish_passes",
    *READING,
    "seed",
    needs=("artefact", "model", "data", "repaired"),
    names={"repaired": "out"},
)
def repair(run: Run, json: bool) -> str:
    """Repair an artefact without labels and save the result as another."""
    methods = repairs_of(run)
    if methods is None:
        raise SettingError("--repair none: expected a repair, got none. Leave it out, or name one.")
    out = folder_to_write(Path(run.repaired or ""))
    import secateur as sc
    from secateur.pipeline.options import TARGETS
    from secateur.pipeline.targets.target import Task
    from secateur.targets.lowrank.opened import GRANULARITIES as RANKS

    inputs = Inputs(run)
    small = inputs.placed(sc.load(run.artefact or "", inputs.source.make))
    before = sc.record_of(small)
    if before.plan.granularity in RANKS:
        raise SettingError(
            "repair: expected an artefact of units, blocks or experts, got layers of low rank: it does not "
            "hold the directions that went, which the repair compares with. Use secateur prune --repair."
        )
    kind = TARGETS[before.plan.granularity]
    kind.check_repair(methods)
    inexact = not all(group.exact for group in before.plan.groups)
    task = Task(
        inputs.model, inputs.data, repair=methods, allow_inexact=inexact, seed=run.seed, progress=True
    )
    better = kind(task).repaired(small, before.plan)
    with folder_in_place(out) as folder:
        sc.save(better, folder)
    tried = sc.record_of(better).repairs[len(before.repairs) :]
    if json:
        return json_format.dumps({"artefact": out.as_posix(), "repairs": list(tried)}, indent=1)
    lines = [_repair_line(each) for each in tried]
    if not any(each["kept"] for each in tried):
        lines.append("Nothing that was tried helped: the model is as it was.")
    return "\n".join([*lines, "", written(out, reload_code(inputs.source.import_line, out))])


def _repair_line(tried: Mapping[str, Any]) -> str:
    from secateur.report.sentences import training

    if "why" in tried:
        return f"{tried['method']}: not done, {tried['why']}"
    return (
        f"{tried['method']}: {'kept' if tried['kept'] else 'not kept'}; {tried['measure']} "
        f"{tried['before']:.4g} before and {tried['after']:.4g} after, on {tried['held_out_samples']} "
        f"samples held out{training(tried)}"
    )
