"""One small model that runs every integer node on its own, away from the noise of the others."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.nested import captured_names
from qdq.report.matched import Match, Site

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
    nodes = [match.graph.nodes[index] for index in (site.index, *site.behind)]
    if any(captured_names(node) for node in nodes):
        return None
    inside = {name for node in nodes for name in node.output}
    found: dict[str, tuple[str, bool]] = {}
    for name in dict.fromkeys(name for node in nodes for name in node.input):
        if not name or name in inside or name in match.constants or name in match.graph.constants:
            continue
        tensor = match.meaning.get(name)
        if tensor is None:
            return None
        pair = match.coded.get(tensor)
        found[name] = (tensor, pair is not None and name in pair.reals)
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
            last = made[-1].name.partition(":")[0]
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
    """A site's nodes as they are, and where they round anything themselves one that does not."""
    node = match.graph.nodes[site.index]
    made = _copies(match, site, needs, "quantized", constants)
    if site.exact is not None:
        made.append(_float_form(match, site, site.exact, needs, constants))
    elif any((entry := match.constants.get(n)) and entry.source for n in node.input):
        made += _copies(match, site, needs, "float", constants)
    return made


def _copies(
    match: Match,
    site: Site,
    needs: Mapping[str, tuple[str, bool]],
    kind: str,
    constants: dict[str, Array],
) -> list[onnx.NodeProto]:
    """The nodes on inputs of their own, with the constants of that kind."""
    nodes = [match.graph.nodes[index] for index in (site.index, *site.behind)]
    inside = {name for node in nodes for name in node.output}
    found = []
    for node in nodes:
        made = _renamed(node, node, kind)
        for slot, name in enumerate(node.input):
            if not name:
                continue
            if name in needs:
                made.input[slot] = _fed(*needs[name])
                continue
            own = name in match.constants or name in inside
            made.input[slot] = f"{kind}:{name}" if own else name
            if name not in inside and made.input[slot] not in constants:
                constants[made.input[slot]] = _value(match, name, kind)
        found.append(made)
    return found


def _float_form(
    match: Match,
    site: Site,
    exact: onnx.NodeProto,
    needs: Mapping[str, tuple[str, bool]],
    constants: dict[str, Array],
) -> onnx.NodeProto:
    """The float node that a site is another form of, on the same inputs."""
    node = match.graph.nodes[site.index]
    last = match.graph.nodes[site.behind[-1]] if site.behind else node
    made = _renamed(exact, last, "float")
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
