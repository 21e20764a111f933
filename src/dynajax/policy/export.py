"""A policy for a machine without JAX: one file, for numpy or for ONNX."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from dynajax.networks.export import Layer
from dynajax.policy.policy import Policy
from dynajax.runs.directory import write_atomically
from dynajax.types import UsageError

#: Of ONNX; the first with LayerNormalization.
_OPSET = 17


def export(policy: Policy, path: Path) -> None:
    """Writes a policy, observations (..., D) to actions (..., A) in the task's bounds.

    Args:
      path: FILE.npz, which `policy.standalone` reads, or FILE.onnx, one input `obs` (B, D) and one
        output `action` (B, A).

    Raises:
      UsageError: another ending, an agent that cannot be exported, a missing package, or a file that
        cannot be written.
    """
    kinds = {".npz": _npz, ".onnx": _onnx}
    if path.suffix not in kinds:
        raise UsageError(f"--export={path}: its name must end in {' or '.join(kinds)}")
    data = kinds[path.suffix](policy)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise UsageError(f"--export={path}: it cannot be written ({error.strerror})") from None


def _npz(policy: Policy) -> bytes:
    layers = policy.layers()
    arrays = {f"{i}.{j}": x for i, layer in enumerate(layers) for j, x in enumerate(layer.arrays)}
    file = io.BytesIO()
    np.savez(
        file,
        allow_pickle=False,
        layers=np.array([layer.kind for layer in layers]),
        low=policy.low,
        high=policy.high,
        task=np.array(policy.spec.name),
        observations=np.array(policy.spec.obs_names),
        **arrays,
    )
    return file.getvalue()


def _onnx(policy: Policy) -> bytes:
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise UsageError(
            f"--export: ONNX is not installed ({error}); pip install 'dynajax[onnx]', or export an .npz"
        ) from None
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(value: Any) -> str:
        name = f"constant_{len(constants)}"
        constants.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def node(kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind.lower()}_{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def step(layer: Layer, x: str, kept: str) -> str:
        if layer.kind == "standardise":
            mean, scale, clip = layer.arrays
            deviation = node("Div", node("Sub", x, constant(mean)), constant(scale))
            return node("Clip", deviation, constant(-clip), constant(clip))
        if layer.kind == "dense":
            kernel, bias = map(constant, layer.arrays)
            return node("Add", node("MatMul", x, kernel), bias)
        if layer.kind == "norm":
            return node("LayerNormalization", x, *map(constant, layer.arrays), epsilon=1e-6)
        if layer.kind == "add":
            return node("Add", x, kept)
        return node({"relu": "Relu", "tanh": "Tanh"}[layer.kind], x)

    x = kept = "obs"
    for layer in policy.layers():
        if layer.kind == "keep":
            kept = x
        else:
            x = step(layer, x, kept)
    low, high = policy.low, policy.high
    scaled = node("Mul", x, constant((high - low) / 2))
    moved = node("Add", scaled, constant((low + high) / 2))
    bounded = node("Max", node("Min", moved, constant(high)), constant(low))
    nodes.append(helper.make_node("Identity", [bounded], ["action"]))

    def port(name: str, size: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])

    graph = helper.make_graph(
        nodes,
        f"policy of {policy.spec.name}",
        [port("obs", policy.spec.obs_dim)],
        [port("action", policy.spec.action_dim)],
        constants,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=8,
        producer_name="dynajax",
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()
