"""Recurrent layers: LSTM, GRU and simple RNNs, several layers, both directions, projections."""

from __future__ import annotations

import numpy as np

from secateur.graph.labels import Labels
from secateur.graph.rules.op import PRODUCE, Axes, Op
from secateur.graph.rules.registry import rule


@rule("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input")
def recurrent(op: Op) -> list[Axes]:
    """Hidden units, the same in every layer and direction because one tensor holds all initial states.

    Weights a layer and direction: input [gates x hidden, in], hidden [gates x hidden, out], then two
    biases [gates x hidden] if any, then an LSTM's projection [out, hidden] if any.
    """
    x = op.axes(op["input"])
    lstm = op.name.startswith("aten.lstm")
    states = list(op["hx"]) if lstm else [op["hx"]]
    biases, bidirectional = bool(op["has_biases"]), bool(op["bidirectional"])
    directions = 2 if bidirectional else 1
    parameters = list(op["params"])
    per_cell = len(parameters) // (op.integer("num_layers") * directions)
    projected = per_cell == (5 if biases else 3)
    state_axes = [op.axes(s) for s in states]
    batch = 0 if op["batch_first"] else 1
    op.freeze(x[1 - batch], "steps in time")
    for layers, samples, _ in state_axes:
        op.freeze(layers, "layers and directions")
        op.tie(samples, x[batch])
    out = state_axes[0][-1]  # what a cell passes on
    hidden = state_axes[1][-1] if lstm else out
    if not projected:
        op.tie(out, hidden)
    below = x[-1]
    for layer in range(op.integer("num_layers")):
        for direction in range(directions):
            start = (layer * directions + direction) * per_cell
            cell = parameters[start : start + per_cell]
            for weight, source in ((cell[0], below), (cell[1], out)):
                rows, columns = op.axes(weight)
                _tie_gates(op, rows, hidden)
                op.tie(columns, source)
                op.consumes(weight, columns)
                op.count(1, *x[:-1], rows, columns)
            for bias in cell[2:4] if biases else []:
                _tie_gates(op, op.axes(bias)[0], hidden)
            if projected:
                rows, columns = op.axes(cell[-1])
                op.tie(rows, out)
                op.tie(columns, hidden)
                op.role(rows, PRODUCE)
                op.consumes(cell[-1], columns)
                op.count(1, *x[:-1], rows, columns)
        below = np.concatenate([out] * directions)
    op.produces(parameters[per_cell - 1 if projected else 0], len(x) - 1)
    return [(*x[:-1], below), *state_axes]


def _tie_gates(op: Op, rows: Labels, hidden: Labels) -> None:
    gates = len(rows) // len(hidden)
    op.tie(rows, np.tile(hidden, gates))
    op.role(rows, PRODUCE)


@rule("aten.lstm_cell.default", "aten.gru_cell.default")
@rule("aten.rnn_tanh_cell.default", "aten.rnn_relu_cell.default")
def cell(op: Op) -> Axes | list[Axes]:
    """One step of one layer: new states from an input [..., in] and states [..., hidden]."""
    x, lstm = op.axes(op["input"]), op.name.startswith("aten.lstm")
    states = [op.axes(s) for s in (op["hx"] if lstm else [op["hx"]])]
    hidden = states[0][-1]
    for state in states:
        op.broadcast(x[:-1], state[:-1])
        op.tie(state[-1], hidden)
    for name, source in (("w_ih", x[-1]), ("w_hh", hidden)):
        rows, columns = op.axes(op[name])
        _tie_gates(op, rows, hidden)
        op.tie(columns, source)
        op.consumes(op[name], columns)
        op.count(1, *x[:-1], rows, columns)
    for name in ("b_ih", "b_hh"):
        if op.get(name) is not None:
            _tie_gates(op, op.axes(op[name])[0], hidden)
    op.produces(op["w_ih"], len(x) - 1)
    out = (*x[:-1], hidden)
    return [out, out] if lstm else out
