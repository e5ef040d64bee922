"""Which tensor of a QDQ model is which of the float model, whatever tool made it.

Tensors are matched by name: the one before a Q, or the one behind its DQ, has the name of the
float tensor. Constants are matched by the place where they are read, since tools rename them.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import replace

import onnx

from qdq.balancing.dividing import divided_like
from qdq.dynamic import FLOAT_FORMS
from qdq.errors import ConfigError, ModelError
from qdq.graph import Graph
from qdq.ops.clamp import bounds
from qdq.ops.demand import NodeView
from qdq.prepare import prepare
from qdq.prepare.constants import constant_nodes
from qdq.prepare.editing import Editor
from qdq.prepare.naming import name_nodes
from qdq.prepare.pixels import pixels_like
from qdq.prepare.rows import in_rows, rows_differ
from qdq.report.codes import params_of
from qdq.report.matched import Coded, Constant, Match, Site, without_arrays
from qdq.report.pieces import MOVED, lookup, movements, relaid, steps
from qdq.targets import ORT_CPU
from qdq.views import node_view

__all__ = ["match", "plain"]

MATRIX = frozenset({"Gemm", "MatMul"})  # their kernels can hand out float
FLOAT_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose nodes have names, and whose constants are initializers that are read."""
    own = onnx.ModelProto()
    own.CopyFrom(model)
    ed = Editor(own)
    name_nodes(ed)
    constant_nodes(ed)
    ed.finish()
    # an input with a default that nothing reads must not become one that the caller has to feed
    left = {t.name for t in model.graph.initializer} - {t.name for t in own.graph.initializer}
    inputs = [v for v in own.graph.input if v.name not in left]
    del own.graph.input[:]
    own.graph.input.extend(inputs)
    return own


def match(
    source: onnx.ModelProto, quantized: onnx.ModelProto, left_float: Container[str] = ()
) -> Match:
    """Match a float model, as from ``load``, with a QDQ model that was made of it.

    Of the float model as it is and as ``prepare`` leaves it, the one is taken that has more nodes
    in common with the quantized one. ``left_float``: nodes known to be float, between whatever.

    Raises:
        ModelError: if no tensor of the float model has codes in the quantized one, and no node
            rounds by itself, unless qdq made that and left everything float.
    """
    graph = Graph(plain(quantized))
    makers = {(n.op_type, o) for n in graph.nodes for o in n.output}
    prepared = prepare(source)
    if rows_differ(prepared, quantized):
        prepared = prepare(source, without=(in_rows,))
    pixels_like(prepared, quantized)
    prepared, names = divided_like(prepared, quantized)
    forms = [Graph(prepared), Graph(plain(source))]
    float_graph = max(forms, key=lambda g: sum((n.op_type, n.output[0]) in makers for n in g.nodes))
    found = _Matcher(float_graph, graph, left_float).match(names)
    all_float = quantized.producer_name == "qdq"  # qdq may find that nothing pays
    dynamic = any(site.exact is not None for site in found.sites)
    if not (found.coded or found.constants or dynamic or all_float):
        raise ModelError(
            "the quantized model has no QuantizeLinear and DequantizeLinear around a tensor of the "
            "float model; compare wants the float model and a QDQ model that was made of it"
        )
    return found


class _Matcher:
    """Lives for one call of match."""

    def __init__(self, float_graph: Graph, graph: Graph, left_float: Container[str]) -> None:
        self.float_graph, self.graph, self.left_float = float_graph, graph, left_float
        known = {*float_graph.inputs, *float_graph.producer}
        self.known = known - without_arrays(float_graph.model)
        self.notes: list[str] = []
        self.pairs: dict[str, Coded] = {}  # by the DQ's output
        self.constants: dict[str, Constant] = {}
        self.meaning: dict[str, str] = {}
        self.before_q: set[str] = set()
        self.inside: set[str] = set()  # tensors with codes within a form of one node

    def match(self, names: Mapping[str, str]) -> Match:
        for node in self.graph.nodes:
            if node.op_type == "DequantizeLinear":
                self._dequantize(node)
        self._name_tensors()
        sites = tuple(self._sites())
        coded: dict[str, Coded] = {}
        for pair in self.pairs.values():
            if (tensor := self.meaning.get(pair.real)) is None:
                continue
            first = coded.setdefault(tensor, pair)
            if first is not pair and first.means(pair):
                coded[tensor] = replace(first, others=(*first.others, pair.real))
        found = {t: c.real for t, c in coded.items()}
        for name, tensor in self.meaning.items():
            found.setdefault(tensor, name)
        lost = sum(
            p.real not in self.meaning and p.real not in self.inside for p in self.pairs.values()
        )
        if lost:
            self.notes.append(f"{lost} tensors with codes have no namesake in the float model")
        return Match(
            float_graph=self.float_graph,
            graph=self.graph,
            meaning=self.meaning,
            coded=coded,
            found=found,
            constants=self.constants,
            sites=sites,
            site_of={s.index: s for s in sites},
            notes=tuple(self.notes),
            undivided={divided: name for name, divided in names.items()},
        )

    def _dequantize(self, node: onnx.NodeProto) -> None:
        codes, real = node.input[0], node.output[0]
        quantizer = self.graph.maker(codes)
        if quantizer is not None and self._keeps_shape(quantizer):
            quantizer = self.graph.maker(quantizer.input[0])
        if quantizer is not None and quantizer.op_type != "QuantizeLinear":
            return
        try:
            params = params_of(self.graph, node)
        except ConfigError as e:
            self.notes.append(f"'{real}' is not compared: {e}")
            return
        stored = codes if quantizer is None else quantizer.input[0]
        if stored in self.graph.constants:
            self.constants[real] = Constant(real, stored, params)
        elif quantizer is not None:
            self.pairs[real] = Coded(stored, real, params)
            self.before_q.add(stored)

    def _keeps_shape(self, node: onnx.NodeProto) -> bool:
        """Whether it is the Reshape that ``emit`` puts between a Q and a DQ of int8."""
        if node.op_type != "Reshape" or node.input[1] not in self.graph.constants:
            return False
        shape = self.graph.array(node.input[1])
        return shape.size > 0 and not shape.any()

    def _name_tensors(self) -> None:
        quantizers = {n.output[0] for n in self.graph.nodes if n.op_type == "QuantizeLinear"}
        names = [*self.graph.inputs, *self.graph.producer]
        self.meaning = {n: n for n in names if n in self.known and n not in quantizers}
        for pair in self.pairs.values():
            tensor = self.meaning.get(pair.raw) or self.meaning.get(pair.real)
            if tensor is not None:
                self.meaning[pair.raw] = self.meaning[pair.real] = tensor

    def _sites(self) -> Iterator[Site]:
        absorbed: set[int] = set()
        for index, node in enumerate(self.graph.nodes):
            if index in absorbed or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                continue
            coded = any(name in self.pairs for name in node.input)
            picked = lookup(self.graph, node, self.meaning)
            behind = self._movements(node) if coded and node.op_type in MOVED else picked
            last = self.graph.nodes[behind[-1]] if behind else node
            ends, limits, passed = self._ends(last) if coded else (list(last.output), None, [])
            outputs = [(o, self.meaning.get(e, "")) for o, e in zip(last.output, ends, strict=True)]
            outputs = [(o, t) for o, t in outputs if t]
            if not outputs:
                continue
            absorbed.update(behind, passed)
            if before := steps(self.graph, index, self.meaning, self.constants):
                yield self._in_steps([*before, index], outputs)
                continue
            has_kernel = ORT_CPU.kernel(node.op_type) is not None
            to_codes = has_kernel and all(e in self.before_q for e in ends)
            fits = coded and (to_codes or node.op_type in MATRIX)
            moved = not picked and (bool(behind) or (coded and self._alone(node, outputs[0][1])))
            site = self._site(index, outputs, picked=bool(picked), moved=moved, fits=fits)
            limits = limits or self._limits_of(outputs[0][1], site.op_type)
            yield replace(site, limits=limits, behind=tuple(behind))

    def _site(
        self, index: int, outputs: list[tuple[str, str]], *, picked: bool, moved: bool, fits: bool
    ) -> Site:
        """A node, without what is known of the nodes behind it.

        Args:
            index: of the node.
            outputs: as in ``Site``.
            picked: it picks rows of codes.
            moved: it is written as movements.
            fits: it would be integer if nobody said that it is float.
        """
        node, tensor = self.graph.nodes[index], outputs[0][1]
        other = MOVED[node.op_type] if moved else FLOAT_FORMS.get(node.op_type)
        other = "Gather" if picked else other
        own = self._source_node(tensor, other or node.op_type)
        if own is not None and not moved:
            self._link_constants(node, own)
        same = node if own is not None else self._namesake(node, tensor)
        name = (own or same).name
        again = relaid(node, own, self.float_graph, self.constants) if moved else ()
        return Site(
            index=index,
            name=name,
            op_type=MOVED[node.op_type] if moved else same.op_type,
            outputs=tuple(outputs),
            limits=None,
            integer=fits and name not in self.left_float,
            reads_codes=any(n in self.pairs or n in self.constants for n in node.input),
            exact=own if other else None,
            relaid=tuple(again),
        )

    def _in_steps(self, form: list[int], outputs: list[tuple[str, str]]) -> Site:
        """A float node that is written as several."""
        own = self.float_graph.maker(outputs[0][1]) or self.graph.nodes[form[-1]]
        return Site(
            index=form[0],
            name=own.name,
            op_type=own.op_type,
            outputs=tuple(outputs),
            limits=None,
            integer=False,
            reads_codes=any(n in self.pairs for i in form for n in self.graph.nodes[i].input),
            behind=tuple(form[1:]),
        )

    def _namesake(self, node: onnx.NodeProto, tensor: str) -> onnx.NodeProto:
        """The float model's node of that name that makes a tensor; the node itself without one."""
        maker = self.float_graph.maker(tensor)
        return maker if maker is not None and maker.name == node.name else node

    def _movements(self, node: onnx.NodeProto) -> list[int]:
        """The movements behind a node that are one node with it; none if it is by itself."""
        found, end = movements(self.graph, node, self.meaning)
        if not found or self._source_node(self.meaning[end], MOVED[node.op_type]) is None:
            return []
        self.inside |= {o for index in found for o in self.graph.nodes[index].output}
        return found

    def _alone(self, node: onnx.NodeProto, tensor: str) -> bool:
        """Whether a Conv is all of a ConvTranspose: at stride 1 nothing is left to be moved."""
        return (
            node.op_type == "Conv"
            and self._source_node(tensor, "Conv") is None
            and self._source_node(tensor, "ConvTranspose") is not None
        )

    def _ends(
        self, node: onnx.NodeProto
    ) -> tuple[list[str], tuple[float, float] | None, list[int]]:
        """The tensors before the Qs behind a node, through a clamp or an identity, if any."""
        name, limits = node.output[0], None
        passed: list[int] = []
        same, between = name, 0  # behind identities alone
        while name not in self.before_q:
            use = self.graph.only_use(name)
            view = node_view(self.graph, use.node) if use is not None and use.slot == 0 else None
            found = bounds(view) if view is not None else None
            identity = view is not None and _is_identity(view)
            if use is None or view is None or not (found or identity):
                return [same, *node.output[1:]], None, passed[:between]
            limits = found or limits
            passed.append(use.node)
            name = view.outputs[0]
            if limits is None:
                same, between = name, len(passed)
        return [name, *node.output[1:]], limits, passed

    def _source_node(self, tensor: str, op_type: str) -> onnx.NodeProto | None:
        """The float model's node of that operator, itself or a clamp before ``tensor``."""
        index = self.float_graph.producer.get(tensor)
        while index is not None:
            node = self.float_graph.nodes[index]
            if node.op_type == op_type:
                return node
            if bounds(node_view(self.float_graph, index)) is None:
                return None
            index = self.float_graph.producer.get(node.input[0])
        return None

    def _limits_of(self, tensor: str, op_type: str) -> tuple[float, float] | None:
        """Bounds of the clamp that the float model has and the codes have to do the work of."""
        index = self.float_graph.producer.get(tensor)
        if index is None or self.float_graph.nodes[index].op_type == op_type:
            return None
        return bounds(node_view(self.float_graph, index))

    def _link_constants(self, node: onnx.NodeProto, own: onnx.NodeProto) -> None:
        for name, source in zip(node.input, own.input, strict=False):
            entry = self.constants.get(name)
            proto = self.float_graph.constants.get(source)
            if entry is None or proto is None or proto.data_type not in FLOAT_TYPES:
                continue
            if tuple(proto.dims) == self.graph.shape(entry.stored):
                self.constants[name] = Constant(entry.real, entry.stored, entry.params, source)


def _is_identity(view: NodeView) -> bool:
    """Whether it is what ``emit`` hides a node with."""
    return view.op_type == "LeakyRelu" and view.attributes.get("alpha") == 1
