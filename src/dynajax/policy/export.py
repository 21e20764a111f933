"""Export a policy to one file for machines without JAX, for NumPy or ONNX."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from dynajax.networks.export import Layer
from dynajax.policy.policy import Policy
from dynajax.runs.directory import write_atomically
from dynajax.types import UsageError

#: ONNX operator set; the first one with LayerNormalization.
_OPSET = 17


def export(policy: Policy, path: Path) -> None:
    """Write a policy as a function from observations to actions within the task's bounds.

    Args:
      policy: policy to export.
      path: FILE.npz, which `policy.standalone` reads, or FILE.onnx with one input `obs` (B, D) and
        one output `action` (B, A).

    Raises:
      UsageError: the file name has another suffix, the agent cannot be exported, a package is
        missing, or the file cannot be written.
    """
    formats = {".npz": _npz, ".onnx": _onnx}
    if path.suffix not in formats:
        raise UsageError(f"--export={path}: the file name must end in {' or '.join(formats)}")
    data = formats[path.suffix](policy)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise UsageError(
            f"--export={path}: the file cannot be written ({error.strerror})"
        ) from None


def _npz(policy: Policy) -> bytes:
    layers = policy.layers()
    arrays = {f"{i}.{j}": x for i, layer in enumerate(layers) for j, x in enumerate(layer.arrays)}
    low, high = policy.float32_bounds
    shape = policy.spec.action_shape
    shape = (policy.spec.action_dim,) if shape is None else shape
    file = io.BytesIO()
    np.savez(
        file,
        allow_pickle=False,
        layers=np.array([layer.kind for layer in layers]),
        low=low.astype(np.float64),
        high=high.astype(np.float64),
        shapes=np.array(json.dumps([shape, policy.spec.obs_parts])),
        task=np.array(policy.spec.name),
        observations=np.array(policy.spec.obs_names),
        **arrays,
    )
    return file.getvalue()


def _onnx(policy: Policy) -> bytes:
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError as error:
        raise UsageError(
            f"--export: ONNX is not installed ({error}); pip install -e '.[onnx]', or export an .npz"
        ) from None
    graph = _OnnxGraph()
    _add_policy(graph, policy)

    def tensor(name: str, size: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])

    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            f"policy of {policy.spec.name}",
            [tensor("obs", policy.spec.obs_dim)],
            [tensor("action", policy.spec.action_dim)],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=8,
        producer_name="dynajax",
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()


class _OnnxGraph:
    """Nodes and constants of an ONNX graph; both are referred to by name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Any) -> str:
        """Add a float32 constant and return its name."""
        from onnx import numpy_helper

        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add an operation and return the name of its output."""
        from onnx import helper

        output = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output


def _add_policy(graph: _OnnxGraph, policy: Policy) -> None:
    """Add the operations from the input "obs" to the output "action"."""
    node, constant = graph.node, graph.constant
    x = residual = "obs"
    for layer in policy.layers():
        if layer.kind == "keep":
            residual = x
        elif layer.kind == "add":
            x = node("Add", x, residual)
        else:
            x = _add_layer(graph, layer, x)
    low, high = policy.float32_bounds
    scaled = node("Mul", x, constant((high - low) / 2))
    shifted = node("Add", scaled, constant((low + high) / 2))
    bounded = node("Max", node("Min", shifted, constant(high)), constant(low))
    node("Identity", bounded, output="action")


def _add_layer(graph: _OnnxGraph, layer: Layer, x: str) -> str:
    """Add the operations of a layer and return the name of its output."""
    node, constant = graph.node, graph.constant
    if layer.kind == "standardise":
        mean, scale, clip = layer.arrays
        deviation = node("Div", node("Sub", x, constant(mean)), constant(scale))
        return node("Clip", deviation, constant(-clip), constant(clip))
    if layer.kind == "dense":
        kernel, bias = map(constant, layer.arrays)
        return node("Add", node("MatMul", x, kernel), bias)
    if layer.kind == "norm":
        return node("LayerNormalization", x, *map(constant, layer.arrays), epsilon=1e-6)
    return node({"relu": "Relu", "tanh": "Tanh"}[layer.kind], x)
