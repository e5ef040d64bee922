"""What will be integer, with which parameters from where, and what stays float and why."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import onnx

from qdq.errors import ConfigError
from qdq.graph import Graph
from qdq.ops import demand_of
from qdq.ops.demand import Bounded, SameAs
from qdq.placement import Placement, Placer, Unit, units_of
from qdq.placement.weighing import Weighing, kind_of
from qdq.problem import Constant, Derived, Fixed, Linear, Observed, Shared, Source, TensorPlan
from qdq.rules import Overrides, read_rules
from qdq.scheme import Scheme
from qdq.spec import INT8, INT32, UINT8, IntType, QuantSpec
from qdq.targets import ORT_CPU, Target
from qdq.views import node_view, nominal_graph

__all__ = ["Plan", "make_plan", "planner"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The product of planning.

    Attributes:
        target: the runtime that it is made for.
        placement: the units and which of them are integer.
        tensors: every tensor that gets parameters.
        linears: the integer nodes that accumulate in int32, for the solver.
        observed: tensors that calibration must observe → the spec that they will have.
        ruled: tensors whose parameters the user's rules set or change.
        signed: integer products of two activations whose right factor is brought to int8.
    """

    target: Target
    placement: Placement
    tensors: Mapping[str, TensorPlan] = field(default_factory=dict)
    linears: tuple[Linear, ...] = ()
    observed: Mapping[str, QuantSpec] = field(default_factory=dict)
    ruled: frozenset[str] = frozenset()
    signed: frozenset[str] = frozenset()

    @property
    def left_float(self) -> Mapping[str, str]:
        """Node name → why it stays float."""
        return self.placement.left_float

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the nodes that run on integers, in graph order."""
        p = self.placement
        return tuple(u.view.name for u in p.units if u.view.name in p.integer)

    @property
    def apart(self) -> tuple[Unit, ...]:
        """The integer nodes that are between float tensors, and round by themselves."""
        p = self.placement
        return tuple(u for u in p.units if u.apart and u.view.name in p.integer)

    @property
    def dynamic(self) -> tuple[Unit, ...]:
        """Those whose kernels round their activations."""
        return tuple(u for u in self.apart if u.dynamic)

    @property
    def lookups(self) -> tuple[Unit, ...]:
        """Those that pick rows of a table of codes."""
        return tuple(u for u in self.apart if u.table)


def make_plan(
    model: onnx.ModelProto,
    scheme: Scheme | None = None,
    target: Target = ORT_CPU,
    weighing: Weighing | None = None,
    source: onnx.ModelProto | None = None,
    seen: Mapping[str, tuple[int, ...]] | None = None,
) -> Plan:
    """Plan the quantization of a prepared model.

    Args:
        model: a float model from ``prepare``.
        scheme: the user's wish; default ``Scheme()``.
        target: what the runtime fuses.
        weighing: prices of kernels; default: those measured for the target.
        source: the user's model before ``prepare``, whose node names rules may use.
        seen: shapes of the inputs in a sample, for the sizes that the model leaves open.

    Raises:
        ConfigError: a type that the target has no kernels for, a rule that matches nothing.
    """
    return planner(model, scheme, target, source, seen)(weighing or Weighing())


def planner(
    model: onnx.ModelProto,
    scheme: Scheme | None = None,
    target: Target = ORT_CPU,
    source: onnx.ModelProto | None = None,
    seen: Mapping[str, tuple[int, ...]] | None = None,
) -> Callable[[Weighing], Plan]:
    """``make_plan`` for any number of weighings; what these have in common is done once.

    Args and Raises: those of ``make_plan``. The model must not change as long as plans are made.
    """
    scheme = scheme or Scheme()
    _check_types(scheme, target)
    graph = Graph(model)
    rules = read_rules(graph, scheme.rules, Graph(source) if source is not None else graph)
    sizes = nominal_graph(model, seen)
    if scheme.activation.symmetric:
        # a range around 0 does not saturate at a Relu's 0, so the kernel cannot do its work
        target = replace(target, absorbs_clamps=False)
    if scheme.activation.dtype.signed:
        target = replace(target, signed_right=False)  # it is brought to int8 from uint8
    placer = Placer(graph, target, units_of(graph, target, rules.pinned), sizes)

    def plan_for(weighing: Weighing) -> Plan:
        placement = placer.place(weighing)
        plan = _Tensors(graph, scheme, target, rules, placement).plan()
        if target.signed_right:
            plan = replace(plan, signed=_signed(plan, graph, sizes))
        if not weighing.price:  # a price may leave float what a rule is about; the user wants both
            rules.check_used(plan.tensors, placement.left_float)
        return plan

    return plan_for


def _signed(plan: Plan, graph: Graph, sizes: Graph) -> frozenset[str]:
    """Products of two activations in uint8 that gain from an int8 factor on the right."""

    def gains(unit: Unit) -> bool:
        factors = [plan.tensors.get(t.name) for t in unit.view.inputs]
        in_bytes = all(t is not None and t.spec.dtype == UINT8 for t in factors)
        ranked = graph.shape(unit.view.inputs[1].name) is not None
        return (
            in_bytes
            and ranked
            and kind_of(unit.view, sizes.shape, signed_right=True) == "MatMul.signed"
        )

    integer = (u for u in plan.placement.units if u.view.name in plan.placement.integer)
    return frozenset(u.view.name for u in integer if u.view.op_type == "MatMul" and gains(u))


def _check_types(scheme: Scheme, target: Target) -> None:
    _want_type(scheme.activation.dtype, "activations", target)
    _want_type(scheme.weight.dtype, "weights", target)
    types = scheme.activation.dtype, scheme.weight.dtype
    if target.kernels is not None and types == (INT8, UINT8):
        raise ConfigError(
            f"{target.name} has no kernel that multiplies int8 activations by uint8 weights; take "
            "int8 weights, or uint8 activations"
        )


def _want_type(dtype: IntType, kind: str, target: Target, where: str = "") -> None:
    """Refuse a type that the target's kernels do not have; ``kind``: activations or weights."""
    allowed = target.activations if kind == "activations" else target.weights
    if dtype not in allowed:
        names = ", ".join(sorted(t.name for t in allowed))
        raise ConfigError(
            f"{target.name} has no integer kernels for {dtype} {kind}{where}; use one of {names}, "
            "or the portable target for other runtimes"
        )


class _Tensors:
    """Collects the tensors of the integer units. Lives for one call of make_plan."""

    def __init__(
        self, graph: Graph, scheme: Scheme, target: Target, rules: Overrides, placement: Placement
    ) -> None:
        self.graph, self.scheme, self.target = graph, scheme, target
        self.rules, self.placement = rules, placement
        self.tensors: dict[str, TensorPlan] = {}
        self.linears: list[Linear] = []
        self.owner: dict[str, str] = {}
        self.read_as_codes: frozenset[str] = frozenset()

    def plan(self) -> Plan:
        units = [u for u in self.placement.units if u.view.name in self.placement.integer]
        self.read_as_codes = frozenset(name for u in units for name in u.reads)
        self._share(units)
        for unit in units:
            self._activations(unit)
            self._linear(unit)
            self._check_types(unit)
        observed = {t.name: t.spec for t in self.tensors.values() if isinstance(t.source, Observed)}
        return Plan(
            target=self.target,
            placement=self.placement,
            tensors=self.tensors,
            linears=tuple(self.linears),
            observed=observed,
            ruled=self.rules.changed & self.tensors.keys(),
        )

    def _share(self, units: list[Unit]) -> None:
        """Outputs of movement nodes belong to the tensor that their values come from.

        Units come in topological order, so the owner of an input is known when its mover comes.
        """
        for unit in units:
            if unit.demand is not None and isinstance(unit.demand.output, SameAs):
                source = unit.view.inputs[unit.demand.output.slot].name
                for name in unit.outputs:
                    if self.graph.elem_type(name) in (0, onnx.TensorProto.FLOAT):
                        self.owner[name] = self.owner.get(source, source)

    def _activations(self, unit: Unit) -> None:
        assert unit.demand is not None  # noqa: S101 -- integer units have a demand
        if unit.apart:
            return
        for slot in unit.demand.activations:
            tensor = unit.view.inputs[slot]
            if tensor.constant:
                self._add(tensor.name, self.scheme.activation, Constant())
            else:
                self._activation(tensor.name)
        kernel = self.target.kernel(unit.view.op_type)
        floats_out = kernel is not None and kernel.float_output
        for name in unit.outputs:
            # a kernel that can hand out float does so unless an integer unit reads its result
            if not floats_out or name in self.read_as_codes:
                self._activation(name)

    def _activation(self, name: str) -> None:
        if name in self.tensors or self.graph.elem_type(name) not in (0, onnx.TensorProto.FLOAT):
            return
        owner = self.owner.get(name, name)
        if owner != name:
            self._activation(owner)
            self._add(name, self.tensors[owner].spec, Shared(owner))
            return
        self._add(name, self.scheme.activation, self._known_range(name) or Observed())

    def _known_range(self, name: str) -> Source | None:
        """The range that mathematics gives the producer's output, integer or not."""
        index = self.graph.producer.get(name)
        if index is None:
            return None
        demand = demand_of(node_view(self.graph, index))
        if isinstance(demand, str) or not isinstance(demand.output, Bounded):
            return None
        if self._attends(index, name):
            return None
        return Fixed(demand.output.low, demand.output.high)

    def _attends(self, index: int, name: str) -> bool:
        """Whether these are weights of attention: of a thousand keys none may get a tenth.

        Steps of 1/255 would then make zeros of nearly all of them.
        """
        if self.graph.nodes[index].op_type != "Softmax" or name in self.graph.outputs:
            return False
        readers = [self.graph.nodes[use.node].op_type for use in self.graph.uses(name)]
        return bool(readers) and all(op in ("MatMul", "Transpose") for op in readers)

    def _linear(self, unit: Unit) -> None:
        demand = unit.demand
        if demand is None or demand.weight is None:
            return
        view, weight = unit.view, demand.weight
        name = view.inputs[weight.slot].name
        per_channel = self.rules.per_channel(name, self.scheme.per_channel)
        spec = QuantSpec(
            dtype=self.scheme.weight.dtype,
            symmetric=self.scheme.weight.symmetric,
            axis=weight.axis if per_channel else None,
        )
        self._add(name, spec, Constant(), "weights")
        bias = view.inputs[demand.bias].name if demand.bias is not None else None
        self.linears.append(
            Linear(
                node=view.name,
                input=view.inputs[0].name,
                weight=name,
                bias=bias,
                kind=weight.kind,
                groups=weight.groups,
                output=unit.outputs[0],
            )
        )
        if bias is not None:
            axis = None if self.tensors[name].spec.axis is None else 0
            derived = QuantSpec(dtype=INT32, symmetric=True, axis=axis)
            self._add(bias, derived, Derived(view.name))

    def _check_types(self, unit: Unit) -> None:
        """A rule may give a tensor another type, but not one that a kernel cannot mix."""
        assert unit.demand is not None  # noqa: S101 -- integer units have a demand
        constants = (unit.view.inputs[slot].name for slot in unit.demand.activations)
        names = [n for n in (*unit.reads, *constants, *unit.outputs) if n in self.tensors]
        types = {self.tensors[n].spec.dtype.name: n for n in names}
        if len(types) > 1 and self.target.one_type:
            found = ", ".join(f"'{n}' {t}" for t, n in sorted(types.items()))
            raise ConfigError(
                f"{self.target.name} has no kernel for {unit.view.op_type} that mixes types "
                f"({found}). Give all of them one type, or keep the node float with "
                f"Rule(nodes={unit.view.name!r}, keep_float=True).",
                node=unit.view.name,
            )

    def _add(self, name: str, spec: QuantSpec, source: Source, kind: str = "activations") -> None:
        if name not in self.tensors:
            wished = spec.dtype
            spec, source = self.rules.apply(name, spec, source)
            if spec.dtype != wished:
                _want_type(spec.dtype, kind, self.target, f", as a rule asks of '{name}'")
            self.tensors[name] = TensorPlan(name=name, spec=spec, source=source)
