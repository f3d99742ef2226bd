"""What `secateur.compat.training` uses is there, and does what it is used for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from secateur.compat import training
from tests.zoo.importing import import_transformers


def test_torch_compile_keeps_the_module() -> None:
    model = nn.Linear(2, 2)
    assert training.compiled_module(torch.compile(model, backend="eager")) is model  # type: ignore[arg-type]
    assert training.compiled_module(model) is None


def test_a_rewrapped_ddp_has_its_settings_hooks_and_new_parameters(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(nn.Linear(4, 3), bucket_cap_mb=3, gradient_as_bucket_view=True)
        called: list[int] = []

        def communicate(state, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations, if there are any
            called.append(bucket.buffer().numel())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        ddp.register_comm_hook(None, communicate)
        ddp.module.weight = nn.Parameter(torch.zeros(2, 4))
        ddp.module.bias = nn.Parameter(torch.zeros(2))
        training.rewrap(ddp)
        assert (ddp.bucket_bytes_cap, ddp.gradient_as_bucket_view) == (3 * 2**20, True)
        ddp(torch.ones(1, 4)).sum().backward()
        assert sum(called) == 10
        assert ddp.module.weight.grad is not None
    finally:
        dist.destroy_process_group()


def test_accelerate_keeps_the_forward_that_it_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(nn.Linear(2, 2))
    x = torch.ones(1, 2)
    assert {"forward", "_original_forward"} <= vars(model).keys()
    with training.own_forward(model):
        assert model(x.requires_grad_()).equal(nn.functional.linear(x, model.weight, model.bias))
        assert not {"forward", "_original_forward"} & vars(model).keys()
    assert {"forward", "_original_forward"} <= vars(model).keys()


def test_the_trainer_has_what_is_called() -> None:
    transformers = import_transformers()
    if transformers is None:
        pytest.skip("Transformers is not installed")
    trainer = transformers.Trainer
    assert list(inspect.signature(trainer._load_from_checkpoint).parameters) == [
        "self",
        "resume_from_checkpoint",
        "model",
    ]
    inspect.signature(trainer._get_output_dir).bind(trainer, trial=None)
    assert "self._load_from_checkpoint(" in inspect.getsource(trainer)
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    config._name_or_path = "owner/model"
    assert "_name_or_path" in inspect.getsource(transformers.PreTrainedModel)
    assert training.name_on_hub(transformers.BertModel(config)) == "owner/model"
    assert training.name_on_hub(nn.Linear(2, 2)) == ""
