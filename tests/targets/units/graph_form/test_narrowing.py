"""What the sentence of a captured program says of sizes, held against what the program does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError
from secateur.graph.inputs import resized
from secateur.graph.wording import CHOICES
from secateur.targets.units.graph_form.program import Program
from secateur.targets.units.record import record_of
from tests.graph.tiny import Calls


def pictures() -> tuple[nn.Module, Any]:
    layers = (
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return nn.Sequential(*layers), (torch.randn(4, 3, 8, 8),)


def patches() -> tuple[nn.Module, Any]:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError("expected a picture of whole patches")
        return m.out(m.inner(m.stem(x).relu()).flatten(2).mean(2))

    parts = {"stem": nn.Conv2d(3, 8, 4, 4), "inner": nn.Conv2d(8, 6, 1), "out": nn.Linear(6, 2)}
    return Calls(forward, **parts), (torch.randn(2, 3, 16, 16),)


def tagger() -> tuple[nn.Module, Any]:
    """Capture fixes the length, which the dense model may change."""

    def forward(m: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = m.table(ids) + torch.stack([m.places.weight[t] for t in range(ids.shape[1])])
        return m.out(m.inner(x * mask[..., None]).relu())

    parts = {
        "table": nn.Embedding(20, 6),
        "places": nn.Embedding(16, 6),
        "inner": nn.Linear(6, 8),
        "out": nn.Linear(8, 5),
    }
    return Calls(forward, **parts), (torch.randint(0, 20, (2, 9)), torch.ones(2, 9))


def positions() -> tuple[nn.Module, Any]:
    """No more than twelve positions."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.out(m.inner(x + m.places.weight[: x.shape[1]]).relu()).mean(1)

    parts = {"places": nn.Embedding(12, 6), "inner": nn.Linear(6, 8), "out": nn.Linear(8, 5)}
    return Calls(forward, **parts), (torch.randn(2, 9, 6),)


def two_lengths() -> tuple[nn.Module, Any]:
    def forward(m: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 5 and y.shape[1] != 6:
            raise ValueError("one length at a time")
        return m.net(x).mean(1) + m.net(y).mean(1)

    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return Calls(forward, net=net), (torch.randn(3, 5, 4), torch.randn(3, 6, 4))


CASES = [pictures, patches, tagger, positions, two_lengths]


def made(case: Callable[[], tuple[nn.Module, Any]]) -> tuple[nn.Module, Any, Program, sc.Plan]:
    torch.manual_seed(0)
    model, x = case()
    graph = sc.trace(model.eval(), x)
    plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
    program = sc.apply(model, plan, "graph", graph=graph)
    assert isinstance(program, Program)
    return sc.apply(model, plan, "masked"), x, program, plan


@pytest.mark.parametrize("case", CASES)
def test_the_program_takes_what_its_sentence_says(case: Callable[[], tuple[nn.Module, Any]]) -> None:
    reference, x, program, plan = made(case)
    spec = program.narrowed(plan.inputs)
    for title, sizes in [("as traced", {}), *spec.other_sizes()]:
        args, kwargs = resized(spec, (x, {}), sizes)
        with torch.no_grad():
            torch.testing.assert_close(program(*args, **kwargs), reference(*args, **kwargs), msg=title)


@pytest.mark.parametrize("case", CASES)
def test_the_program_refuses_what_its_sentence_fixes(case: Callable[[], tuple[nn.Module, Any]]) -> None:
    _, x, program, plan = made(case)
    spec = program.narrowed(plan.inputs)
    may = {place for axis in spec.open for place in axis.places}
    for name, leaf in spec.tensors().items():
        for axis, size in enumerate(leaf.shape):
            if (name, axis) in may:
                continue
            for other in (size - 1, size + 1, 2 * size):
                args, kwargs = resized(spec, (x, {}), {(name, axis): other})
                with pytest.raises(InputError):
                    program(*args, **kwargs)


@pytest.mark.parametrize("case", CASES)
def test_sizes_beside_its_limits_run_right_or_are_refused(case: Callable[[], tuple[nn.Module, Any]]) -> None:
    reference, x, program, plan = made(case)
    for axis in program.narrowed(plan.inputs).open:
        for other in range(1, 2 * axis.size + 2):
            args, kwargs = resized(plan.inputs, (x, {}), dict.fromkeys(axis.places, other))
            try:
                with torch.no_grad():
                    got = program(*args, **kwargs)
            except InputError:
                continue
            assert (
                not axis.limit.startswith("a multiple of")
                or other % int(axis.limit.split()[3].strip(",")) == 0
            )
            with torch.no_grad():
                torch.testing.assert_close(got, reference(*args, **kwargs))


def test_a_size_that_only_the_program_fixes_is_said_to_be_so() -> None:
    _, _, program, plan = made(tagger)
    text = record_of(program).takes
    assert "axis 1 of" in plan.inputs.sentence().split("you must keep")[0]
    assert "axis 1 of" not in text.split("you must keep")[0]
    assert "at 9 (the dense model takes others, the captured program does not)" in text
    assert "; the captured program raises InputError at a size that it does not know. " in text


def test_limits_are_said() -> None:
    _, _, program, _ = made(patches)
    assert "(a multiple of 4; 16 and 24 tried)" in record_of(program).takes
    with pytest.raises(InputError) as refused:
        program(torch.randn(2, 3, 16, 18))
    assert "opened.py" not in str(refused.value)  # no line of ours


def test_each_form_has_its_sentence() -> None:
    model, x = pictures()
    graph = sc.trace(model.eval(), x)
    plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
    module, zeroed = (sc.apply(model, plan, form, graph=graph) for form in ("module", "masked"))
    assert record_of(module).takes == f"{graph.inputs.sentence()} {CHOICES}"
    assert "every input size that you may change in the dense model" in record_of(zeroed).takes
