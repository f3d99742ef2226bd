"""A rotated model computes what the dense one does; a narrowed one what it does without some directions."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import ArtefactError
from secateur.targets.units.compare import relative_difference, run_in_double
from secateur.targets.width.rotate import helmert
from tests.targets.experts import models as experts
from tests.targets.width.models import CONFIGS, EXACT, WIDTH, data, make

KEPT = 12


@lru_cache
def rotated(family: str) -> tuple[nn.Module, nn.Module]:
    """The dense model and the rotated one."""
    model = make(family)
    return model, sc.rotate(model, data(family), progress=False)


def outputs(model: nn.Module, family: str) -> list[Tensor]:
    """For inputs that nothing has seen."""
    (batch,) = data(family, 1, size=3, seed=7)
    return run_in_double(model, (), batch)


def embedding(model: nn.Module, family: str) -> Tensor:
    """What writes to the stream first. [entries, width]"""
    if family == "vit":
        weight = model.vit.embeddings.patch_embeddings.projection.weight
        return weight.detach().flatten(1).T
    return model.get_input_embeddings().weight.detach()


@pytest.mark.parametrize("family", EXACT)
def test_the_rotated_model_computes_the_same(family: str) -> None:
    model, turned = rotated(family)
    assert relative_difference(outputs(turned, family), outputs(model, family)) < 1e-9
    assert type(turned) is type(model)
    moved = embedding(turned, family) - embedding(model, family)
    assert float(moved.norm()) > 0.5 * float(embedding(model, family).norm())


@pytest.mark.parametrize("family", EXACT)
def test_the_narrowed_model_is_the_dense_one_whose_norms_read_fewer_directions(family: str) -> None:
    """The directions are read off the embedding, and the dense model keeps its own norms."""
    model, turned = rotated(family)
    small = sc.narrow(turned, data(family), KEPT, repair=None, progress=False)
    assert embedding(small, family).shape[1] == KEPT
    before, after = embedding(model, family), embedding(turned, family)
    centred = family in ("gpt2", "opt", "vit")
    if centred:
        before = before - before.mean(1, keepdim=True)
    basis = torch.linalg.lstsq(before, after).solution  # turned = before @ basis
    vectors = basis @ helmert(WIDTH)[:, : KEPT - 1] if centred else basis[:, :KEPT]

    def project(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0] - args[0].mean(-1, keepdim=True) if centred else args[0]
        return (x @ vectors @ vectors.T, *args[1:])

    reference = copy.deepcopy(model)
    for name, module in reference.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and weight is not None and len(weight) == WIDTH:
            assert "q_norm" not in name
            module.register_forward_pre_hook(project)
    wanted = outputs(reference, family)
    assert relative_difference(outputs(small, family), wanted) < 1e-9
    assert relative_difference(outputs(model, family), wanted) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_first_units_carry_most_of_what_layers_read(family: str) -> None:
    _, turned = rotated(family)
    found = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().reshape(-1, WIDTH)
        x = x - x.mean(1, keepdim=True) if family == "gpt2" else x
        x = x / x.square().mean(1, keepdim=True).sqrt()
        found.addmm_(x.T, x)

    names = [n for n, m in turned.named_modules() if type(m).__name__ in ("LayerNorm", "LlamaRMSNorm")]
    handles = [turned.get_submodule(name).register_forward_pre_hook(hook) for name in names]
    with torch.no_grad():
        for batch in data(family):
            turned(**batch)
    for handle in handles:
        handle.remove()
    if family == "gpt2":
        found = helmert(WIDTH).T @ found @ helmert(WIDTH)
    sizes = found.diagonal()
    assert bool((sizes[:-1] >= sizes[1:] - 1e-9).all())
    assert float((found - torch.diag(sizes)).abs().max()) < 1e-8 * float(sizes[0])


def test_a_tied_embedding_is_untied_and_the_dense_model_is_left_alone() -> None:
    model = make("llama")
    before = copy.deepcopy(model.state_dict())
    turned = sc.rotate(model, data("llama"), progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert turned.lm_head.weight is not turned.model.embed_tokens.weight
    assert not turned.config.tie_word_embeddings
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_it_is_saved_and_loaded_and_stock_code_takes_the_folder(tmp_path: Path) -> None:
    _, turned = rotated("llama")
    small = sc.narrow(turned, data("llama"), KEPT, progress=False)
    assert small.config.hidden_size == KEPT
    sc.save(small, tmp_path / "small")
    again = sc.load(tmp_path / "small", lambda: type(turned)(copy.deepcopy(turned.config)).double())
    pairs = zip(outputs(again, "llama"), outputs(small, "llama"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ArtefactError, match=r"lm_head.weight to be separate tensors, .* Make it without"):
        sc.load(tmp_path / "small", lambda: make("llama"))  # which is tied
    small.save_pretrained(tmp_path / "stock")
    stock = type(turned).from_pretrained(tmp_path / "stock", dtype=torch.float64)
    assert relative_difference(outputs(stock, "llama"), outputs(small, "llama")) < 1e-9


def test_repair_comes_nearer_on_new_inputs() -> None:
    model, turned = rotated("llama")
    batches = data("llama", 5, size=40, seed=1)
    plain = sc.narrow(turned, batches, KEPT, repair=None, progress=False)
    better = sc.narrow(turned, batches, KEPT, progress=False)
    held = data("llama", 1, size=40, seed=9)
    losses = [sc.evaluate(m, held, dense=model).loss for m in (plain, better)]
    assert losses[1] < losses[0]


@pytest.mark.slow
def test_a_mixture_of_experts_is_narrowed() -> None:
    """Its fused experts are captured with a kernel that does not know float64."""
    torch.manual_seed(0)
    model = experts.make("qwen2")
    batches = [{"input_ids": part} for part in experts.words(24, 12).chunk(3)]
    turned = sc.rotate(model, batches, progress=False)
    small = sc.narrow(turned, batches, 24, repair=None, progress=False)
    assert small.get_input_embeddings().weight.shape[1] == 24  # type: ignore[operator]
    with torch.no_grad():
        assert relative_difference([turned(**batches[0]).logits], [model(**batches[0]).logits]) < 1e-4


def test_what_cannot_be_rotated_is_refused() -> None:
    with pytest.raises(sc.SettingError, match="post_attention_layernorm: it lies between a layer"):
        sc.rotate(make("gemma3"), data("gemma3"), progress=False)
    with pytest.raises(sc.VerificationError, match=r"as a norm behind an addition does \(BERT\)"):
        sc.rotate(make("bert"), data("bert"), progress=False)
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    with pytest.raises(sc.SettingError, match="no group of this model is mixed by a norm alone"):
        sc.rotate(plain, [torch.randn(8, 4)], progress=False)


class _Block(nn.Module):
    """A residual block; `acts` puts a function on the stream, `scales` factors on what is added."""

    def __init__(self, acts: bool = False, scales: bool = False, bare: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.gamma = nn.Parameter(torch.rand(8)) if scales else None
        self.acts, self.side = acts, nn.Linear(8, 8) if bare else None

    def forward(self, x: Tensor) -> Tensor:
        added = self.down(torch.relu(self.up(self.norm(x))))
        if self.gamma is not None:
            added = added * self.gamma
        if self.side is not None:
            added = added + self.side(x)
        x = x + added
        return torch.tanh(x) if self.acts else x


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"acts": True}, sc.VerificationError, "Something else than norms followed by layers acts"),
        ({"scales": True}, sc.SettingError, "no layer reads 1: it lies between a layer and the stream"),
        ({"bare": True}, sc.SettingError, "1.side.weight reads it without a norm of its own before it"),
        ({}, None, ""),
    ],
)
def test_what_acts_on_the_stream_is_seen(options: dict[str, bool], error: Any, match: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), _Block(**options), _Block(), nn.RMSNorm(8), nn.Linear(8, 3)).eval()
    batches = [torch.randn(16, 4) for _ in range(3)]
    if error is None:
        turned = sc.rotate(model, batches, progress=False)
        small = sc.narrow(turned, batches, 6, progress=False)  # in float32, and so are its inputs
        assert small[1].up.weight.shape == (12, 6)
        torch.testing.assert_close(turned(batches[0]), model(batches[0]), rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(error, match=match):
        sc.rotate(model, batches, progress=False)


def test_widths_and_models_that_narrow_does_not_take() -> None:
    model, turned = rotated("qwen3")
    for width in (1, WIDTH, 2.5):
        with pytest.raises(sc.SettingError, match=f"expected a number from 2 to {WIDTH - 1}"):
            sc.narrow(turned, data("qwen3"), width, progress=False)  # type: ignore[arg-type]
    with pytest.raises(sc.SettingError, match=r"still has weights of its own. Pass sc.rotate"):
        sc.narrow(model, data("qwen3"), KEPT, progress=False)


def test_families_are_known() -> None:
    assert set(EXACT) | {"bert", "gemma3"} == set(CONFIGS)
