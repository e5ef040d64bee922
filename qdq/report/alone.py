"""One small model that runs every integer node on its own, away from the noise of the others."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.nested import captured_names
from qdq.report.matching import Match, Site

__all__ = ["Alone", "build_alone", "needed_by"]

Array = NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """The model and how to use it.

    Attributes:
        model: no node reads another one's result, so every node gets just what it is fed.
        inputs: model input → (float tensor, whether it is to be rounded to its codes).
        pairs: output of a site in the quantized model → (name with quantized constants, name with
            float constants). The two are one name for a node without constants.
    """

    model: onnx.ModelProto
    inputs: Mapping[str, tuple[str, bool]]
    pairs: Mapping[str, tuple[str, str]]


def needed_by(match: Match, site: Site) -> dict[str, tuple[str, bool]] | None:
    """Inputs of a site: own name → (float tensor, rounded); None if one of them is unknown."""
    node = match.graph.nodes[site.index]
    if captured_names(node):
        return None
    found: dict[str, tuple[str, bool]] = {}
    for name in node.input:
        if not name or name in match.constants or name in match.graph.constants:
            continue
        tensor = match.meaning.get(name)
        if tensor is None:
            return None
        pair = match.coded.get(tensor)
        found[name] = (tensor, pair is not None and pair.real == name)
    return found


def build_alone(match: Match, types: Mapping[str, np.dtype[np.generic]]) -> Alone:
    """Build the model.

    Args:
        match: the two models.
        types: types of the float tensors that the sites read.
    """
    graph = match.graph
    inputs: dict[str, tuple[str, bool]] = {}
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Array] = {}
    pairs: dict[str, tuple[str, str]] = {}
    for site in match.sites:
        needs = needed_by(match, site) if site.rounds else None
        if needs:
            inputs |= {_fed(*need): need for need in needs.values()}
            made = _forms(match, site, needs, constants)
            nodes += made
            last = "float" if len(made) > 1 else "quantized"
            pairs |= {own: (f"quantized:{own}", f"{last}:{own}") for own, _ in site.outputs}
    model = onnx.ModelProto()
    model.ir_version = graph.model.ir_version
    model.opset_import.extend(graph.model.opset_import)
    model.graph.name = "alone"
    model.graph.node.extend(nodes)
    for name, value in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    for name, (tensor, _) in inputs.items():
        kind_number = onnx.helper.np_dtype_to_tensor_dtype(types[tensor])
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind_number, None))
    for name in dict.fromkeys(n for pair in pairs.values() for n in pair):
        model.graph.output.add(name=name)
    return Alone(model=model, inputs=inputs, pairs=pairs)


def _fed(tensor: str, rounded: bool) -> str:
    return f"{'rounded' if rounded else 'exact'}:{tensor}"


def _forms(
    match: Match,
    site: Site,
    needs: Mapping[str, tuple[str, bool]],
    constants: dict[str, Array],
) -> list[onnx.NodeProto]:
    """A site's node as it is, and where it rounds anything itself one that does not."""
    node = match.graph.nodes[site.index]
    made = [_copy(match, node, needs, "quantized", constants)]
    if site.exact is not None:
        made.append(_float_form(match, node, site.exact, needs, constants))
    elif any((entry := match.constants.get(n)) and entry.source for n in node.input):
        made.append(_copy(match, node, needs, "float", constants))
    return made


def _copy(
    match: Match,
    node: onnx.NodeProto,
    needs: Mapping[str, tuple[str, bool]],
    kind: str,
    constants: dict[str, Array],
) -> onnx.NodeProto:
    """The node on inputs of its own, with the constants of that kind."""
    made = _renamed(node, node, kind)
    for slot, name in enumerate(node.input):
        if not name:
            continue
        if name in needs:
            made.input[slot] = _fed(*needs[name])
            continue
        made.input[slot] = f"{kind}:{name}" if name in match.constants else name
        if made.input[slot] not in constants:
            constants[made.input[slot]] = _value(match, name, kind)
    return made


def _float_form(
    match: Match,
    node: onnx.NodeProto,
    exact: onnx.NodeProto,
    needs: Mapping[str, tuple[str, bool]],
    constants: dict[str, Array],
) -> onnx.NodeProto:
    """The float node that a node is another form of, on the same inputs."""
    made = _renamed(exact, node, "float")
    for slot, name in enumerate(exact.input):
        if node.input[slot] in needs:
            made.input[slot] = _fed(*needs[node.input[slot]])
        elif name:
            made.input[slot] = f"float:{name}"
            constants[made.input[slot]] = match.float_graph.array(name)
    return made


def _renamed(form: onnx.NodeProto, node: onnx.NodeProto, kind: str) -> onnx.NodeProto:
    """A copy of a form of a node, whose own name and outputs tell the kind."""
    made = onnx.NodeProto()
    made.CopyFrom(form)
    made.name = f"{kind}:{node.name}"
    for slot, name in enumerate(node.output):
        made.output[slot] = f"{kind}:{name}" if name else ""
    return made


def _value(match: Match, name: str, kind: str) -> Array:
    entry = match.constants.get(name)
    if entry is None:
        return match.graph.array(name)
    if entry.source is None:
        return entry.value(match.graph)
    own = match.float_graph.floats(entry.source)
    if kind == "float":
        return own
    return entry.value(match.graph).astype(own.dtype)
