"""The names that a configuration accepts (rules, signals, repairs), listed here to avoid importing torch.

A test compares each list with the library's registries.
"""

from __future__ import annotations

from typing import Literal

Granularity = Literal[
    "unit",
    "weight",
    "expert",
    "unit+expert",
    "block",
    "unit+block",
    "head_size",
    "unit+head_size",
    "unit+head_size+block",
    "rank",
    "unit+rank",
]
Form = Literal["auto", "module", "graph", "masked"]
Unrealisable = Literal["graph", "leave"]
Backend = Literal["eager", "compile", "onnxruntime", "onnx"]
Quantisation = Literal["int8", "int4"]
MaskRule = Literal[
    "emp",
    "uniform",
    "global",
    "flap",
    "erk",
    "lamp",
    "owl",
    "repairability",
    "repair_aware",
    "ratios",
    "random",
]
Rule = Literal["auto", "search", "tod", MaskRule]
Criterion = Literal["magnitude", "wanda", "taylor", "snip", "fisher", "random"]
MaskRepair = Literal["variance", "channelwise", "layerwise", "reconstruct", "batchnorm", "surgeon"]

SIGNALS = (
    "wasserstein",
    "taylor",
    "magnitude",
    "l1",
    "l2",
    "batchnorm_scale",
    "geometric_median",
    "activation",
    "apoz",
    "rank",
    "reconstruction",
    "fluctuation",
    "wanda",
    "taylor_sample",
    "fisher",
    "snip",
    "random",
)
EXPERT_SIGNALS = (
    "frequency",
    "router_weight",
    "reap",
    "output_change",
    "specialisation",
    "expert_taylor",
    "weight_norm",
    "random",
)
BLOCK_SIGNALS = (
    "output_change",
    "stream_change",
    "stream_distance",
    "block_taylor",
    "magnitude",
    "random",
)
REPAIRS = (
    "auto",
    "none",
    "reconstruct",
    "variance",
    "channelwise",
    "layerwise",
    "bias",
    "batchnorm",
    "polish",
    "surgeon",
    "experts",
    "merge",
)
