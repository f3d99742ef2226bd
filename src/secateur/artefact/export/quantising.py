"""Write ONNX files with few bits, by ONNX Runtime's own quantisers, and run them as a module of PyTorch."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.artefact.export.onnx import require_onnx, session_options
from secateur.common.foreign import details, error_text
from secateur.config.names import Quantisation
from secateur.errors import ExportError, SettingError

KINDS: tuple[Quantisation, ...] = get_args(Quantisation)
BLOCK = 32
"""Weights that share one scale, for int4."""

Feeds = Mapping[str, Any]
"""NumPy arrays by the names of a session's inputs."""

NODES = {"int8": "QuantizeLinear", "int4": "MatMulNBits"}
"""The operator that shows that something was quantised."""


def int8(model: bytes, samples: Iterable[Feeds]) -> bytes:
    """Return a model with weights and activations of 8 bits.

    Each weight gets one scale an output channel, each activation one scale and zero point, from the least and
    the largest value that it takes in `samples`. The file states this with pairs of ``QuantizeLinear`` and
    ``DequantizeLinear``, which ONNX Runtime fuses into operators on integers.

    Args:
        model: An ONNX file in float32.
        samples: What the activations are observed on.

    Raises:
        ExportError: ONNX Runtime cannot quantise it, or found nothing to quantise.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # a class without types
        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> Feeds | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder, _quiet("int8"):
        given, folded, made = (Path(folder) / name for name in ("given.onnx", "folded.onnx", "made.onnx"))
        given.write_bytes(model)
        # Symbolic shapes are for operators of ONNX Runtime's own, of which the exporter writes none.
        quant_pre_process(given, folded, skip_symbolic_shape=True)
        quantization.quantize_static(
            folded,
            made,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return _checked("int8", made.read_bytes())


def int4(model: bytes) -> bytes:
    """Return a model whose matrix products have weights of 4 bits; everything else stays as it is.

    Each run of `BLOCK` weights along the inputs of a product has one scale. No samples are needed.

    Args:
        model: An ONNX file in float32.

    Raises:
        ExportError: ONNX Runtime cannot quantise it, or found nothing to quantise.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with _quiet("int4"):
        given = _with_products(onnx.load_from_string(model))
        quantiser = MatMulNBitsQuantizer(given, bits=4, block_size=BLOCK, is_symmetric=True)
        quantiser.process()
        return _checked("int4", quantiser.model.model.SerializeToString())


def _with_products(model: Any) -> Any:
    """Write ``Gemm`` with a stored weight as ``MatMul`` and ``Add``, in place: int4 knows only ``MatMul``.

    The exporter writes ``Gemm`` for linear layers whose inputs have two axes.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = not given.get("transA") and given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0
        if node.op_type != "Gemm" or not plain or node.input[1] not in stored:
            nodes.append(node)
            continue
        weight, product, biased = node.input[1], node.output[0], len(node.input) > 2 and node.input[2]
        if given.get("transB"):
            weight = f"{weight}.turned"
            if weight not in stored:
                turned = numpy_helper.to_array(stored[node.input[1]]).T.copy()
                stored[weight] = numpy_helper.from_array(turned, weight)
                graph.initializer.append(stored[weight])
        if biased:
            product = f"{product}.product"
            sums = helper.make_node("Add", [product, node.input[2]], [node.output[0]], f"{node.name}.sum")
        nodes.append(helper.make_node("MatMul", [node.input[0], weight], [product], node.name))
        nodes += [sums] if biased else []
    used = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    for held, new in ((graph.initializer, kept), (graph.node, nodes)):
        copies = [each.__class__.FromString(each.SerializeToString()) for each in new]
        del held[:]
        held.extend(copies)
    return model


def _checked(kind: str, made: bytes) -> bytes:
    import onnx

    operators = {node.op_type for node in onnx.load_from_string(made).graph.node}
    if NODES[kind] not in operators:
        wanted = (
            "convolutions or matrix products" if kind == "int8" else "matrix products with stored weights"
        )
        raise ExportError(
            f"quantise({kind}): expected a model with {wanted}, got none that ONNX Runtime quantises. Leave "
            "quantise out."
        )
    return made


class OnnxModel(nn.Module):
    """An ONNX file that is called like the model it was written from, on the CPU and without gradients.

    Mappings of inputs go by name. Outputs are a tensor, a tuple, or an object with the model's names.
    """

    def __init__(self, model: bytes, outputs: tuple[str, ...], threads: int | None = None) -> None:
        """Start ONNX Runtime.

        Args:
            model: The content of an ONNX file.
            outputs: The names of its outputs, from `Captured`.
            threads: Threads within an operator. Default: those of PyTorch.
        """
        require_onnx()
        import onnxruntime

        super().__init__()
        options = session_options({"intra_op_num_threads": threads or torch.get_num_threads()})
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.inputs = [entry.name for entry in self.session.get_inputs()]
        self.outputs = outputs

    def feeds(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's tensors by the names of the inputs. Labels, which no input is called, are left out.

        Raises:
            SettingError: There are more or fewer tensors than inputs.
        """
        given = {name: value for name, value in kwargs.items() if name in self.inputs}
        free = [name for name in self.inputs if name not in given]
        nested = [value for name, value in kwargs.items() if name not in given and name != "labels"]
        leaves = [v for v in pytree.tree_leaves((args, nested)) if isinstance(v, torch.Tensor)]
        if len(leaves) != len(free):
            raise SettingError(
                f"quantise: expected {len(self.inputs)} tensors for the inputs {', '.join(self.inputs)}, got "
                f"{len(given) + len(leaves)}. Pass batches like the example inputs."
            )
        given |= dict(zip(free, leaves, strict=True))
        for entry in self.session.get_inputs():
            shape = list(given[entry.name].shape)
            if len(shape) != len(entry.shape) or any(
                isinstance(size, int) and size != got for size, got in zip(entry.shape, shape, strict=True)
            ):
                sizes = ", ".join(str(size) if isinstance(size, int) else "any" for size in entry.shape)
                raise SettingError(
                    f"quantise: expected {entry.name} [{sizes}] as in the first batch, only its number of "
                    f"samples may differ where the model allows it, got {shape}. Pass batches of one shape."
                )
        return {name: value.detach().cpu().numpy() for name, value in given.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file."""
        try:
            found = self.session.run(None, self.feeds(args, kwargs))
        except SettingError:
            raise
        except Exception as error:  # ONNX Runtime raises its own
            raise SettingError(
                f"quantise: expected inputs of the sizes of the first batch, only its number of samples may "
                f"differ where the model allows it, got {error_text(error)}. Pass batches of one shape.",
                details(error),
            ) from error
        tensors = [torch.as_tensor(value) for value in found]
        if self.outputs == ("output",):
            return tensors[0]
        if all(name.startswith("output_") for name in self.outputs):
            return tuple(tensors)
        return SimpleNamespace(**dict(zip(self.outputs, tensors, strict=True)))


@contextmanager
def _quiet(kind: str) -> Iterator[None]:
    """Hide what the quantisers print and log inside the block, and say what their failures mean."""
    was = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        except (ExportError, SettingError):
            raise
        except Exception as error:  # the quantisers raise all kinds
            raise ExportError(
                f"quantise({kind}): expected a model that ONNX Runtime can quantise, got "
                f"{error_text(error)}. Leave quantise out, or use another version of onnxruntime.",
                details(error),
            ) from error
        finally:
            logging.disable(was)
