"""Rules for LSTM, GRU and simple recurrent layers."""

from __future__ import annotations

import numpy as np

from secateur.graph.labels import Labels
from secateur.graph.rules.op import PRODUCE, Axes, Op
from secateur.graph.rules.registry import rule


@rule("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input")
@rule("aten.lstm.data", "aten.gru.data", "aten.rnn_tanh.data", "aten.rnn_relu.data")
def recurrent(op: Op) -> list[Axes]:
    """Run a recurrent layer, or several on top of each other, in one direction or both.

    A hidden unit is one unit across all layers and directions, because one tensor
    [layers x directions, batch, hidden] holds all their initial states.

    Each layer has these weights for each direction, in this order: input [gates x hidden, in], hidden
    [gates x hidden, out], two biases [gates x hidden] if there are biases, and the projection [out, hidden]
    if an LSTM has one. Packed sequences have one axis [rows, in] in place of steps and samples.
    """
    packed = op.name.endswith(".data")
    x = op.axes(op["data" if packed else "input"])
    lstm = op.name.startswith("aten.lstm")
    states = list(op["hx"]) if lstm else [op["hx"]]
    biases, bidirectional = bool(op["has_biases"]), bool(op["bidirectional"])
    directions = 2 if bidirectional else 1
    parameters = list(op["params"])
    per_cell = len(parameters) // (op.integer("num_layers") * directions)
    projected = per_cell == (5 if biases else 3)
    state_axes = [op.axes(s) for s in states]
    batch = 0 if not packed and op["batch_first"] else 1
    op.freeze(x[0 if packed else 1 - batch], "steps in time")
    for layers, samples, _ in state_axes:
        op.freeze(layers, "layers and directions")
        if packed:
            op.freeze(samples, "samples of packed sequences")
        else:
            op.tie(samples, x[batch])
    out = state_axes[0][-1]  # what a cell gives to the next step and layer
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
    """Tie the rows of a weight, which hold one block of hidden units for each gate, to the hidden units."""
    gates = len(rows) // len(hidden)
    op.tie(rows, np.tile(hidden, gates))
    op.role(rows, PRODUCE)


@rule("aten.lstm_cell.default", "aten.gru_cell.default")
@rule("aten.rnn_tanh_cell.default", "aten.rnn_relu_cell.default")
def cell(op: Op) -> Axes | list[Axes]:
    """Run one step of one recurrent layer: from an input [..., in] and states [..., hidden] to new states."""
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
