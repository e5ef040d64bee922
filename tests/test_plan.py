"""Plan and placement: what is integer, with parameters from where, what stays float and why."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from harness import FORCED, quantized
from models import conv_chain, feeds, mlp, model, node, residual, weights

from qdq.errors import ConfigError
from qdq.placement.weighing import Weighing
from qdq.plan import Plan, make_plan, planner
from qdq.prepare import prepare
from qdq.problem import Derived, Fixed, Given, Observed, Shared
from qdq.scheme import Rule, Scheme
from qdq.spec import INT8, INT16, INT32, UINT8, UINT16, IntType, QuantSpec
from qdq.targets import ORT_CPU, PORTABLE, Target


def planned(net: onnx.ModelProto, *rules: Rule, **more) -> Plan:
    more.setdefault("target", FORCED)
    return make_plan(prepare(net), Scheme(rules=rules), source=net, **more)


def test_a_clamp_is_part_of_its_unit() -> None:
    plan = planned(conv_chain(clamp="Clip"))
    assert [u.clamp for u in plan.placement.units] == ["Clip_r0", "Clip_r1", "Clip_r2"]
    # the range is that after the clamp; the tensor before it gets no parameters
    assert "r0" in plan.observed
    assert "c0" not in plan.tensors


def test_a_planner_makes_what_make_plan_makes_whatever_it_made_before() -> None:
    net = prepare(residual())
    plan_for = planner(net, target=ORT_CPU, source=net)
    weighings = [Weighing(noise=n, least=0.0) for n in (0.0, 10.0, 0.0)]
    plans = [plan_for(w) for w in weighings]
    assert plans == [make_plan(net, target=ORT_CPU, weighing=w, source=net) for w in weighings]
    assert plans[0].placement.integer > plans[1].placement.integer


def test_a_clamp_that_leaves_out_zero_is_not_absorbed() -> None:
    net = model(
        [node("Conv", ["x", "w"], "c"), node("Clip", ["c", "lo", "hi"], "y")],
        {"x": [1, 4, 8, 8]},
        {"y": [1, 4, 8, 8]},
        {"w": weights(4, 4, 1, 1), "lo": np.float32(1), "hi": np.float32(6)},
    )
    plan = planned(net)
    assert plan.placement.units[0].clamp is None
    assert "Clip_y" in plan.left_float
    assert {"c"} <= set(plan.observed)


@pytest.mark.parametrize("target", [FORCED, PORTABLE], ids=["forced", "portable"])
def test_a_softmax_in_parts_is_float_as_a_whole(target) -> None:
    net = model(
        [
            node("Conv", ["x", "w"], "c"),
            node("Softmax", ["c"], "s", axis=1),
            node("Conv", ["s", "v"], "y"),
        ],
        {"x": [1, 16, 8, 8]},
        {"y": [1, 16, 8, 8]},
        {"w": weights(16, 16, 3, 3), "v": weights(16, 16, 1, 1)},
    )
    net.graph.node[0].attribute.append(onnx.helper.make_attribute("pads", [1, 1, 1, 1]))
    plan = planned(net, target=target)
    assert {"Conv_c", "Conv_y"} == set(plan.quantized)
    whole = [why for why in plan.left_float.values() if "softmax" in why]
    assert len(whole) == 4  # ReduceMax, Sub, Exp, Div; ReduceSum has no integer kernel
    assert plan.left_float["Softmax_s"] == "it is part of a softmax, which is never split"


def test_the_last_gemm_hands_out_float() -> None:
    plan = planned(mlp())
    assert set(plan.quantized) == {"Gemm_h", "Gemm_y"}
    assert "y" not in plan.tensors
    assert "hr" in plan.observed


def test_bias_and_weight_are_linked() -> None:
    plan = planned(mlp())
    linear = plan.linears[0]
    assert (linear.input, linear.weight, linear.bias, linear.kind) == ("x", "w0", "b0", "matmul")
    assert plan.tensors["b0"].source == Derived("Gemm_h")
    assert plan.tensors["w0"].spec == QuantSpec(dtype=INT8, symmetric=True, axis=1)


def test_movement_shares_with_its_source() -> None:
    net = model(
        [
            node("Conv", ["x", "w"], "c"),
            node("MaxPool", ["c"], "m", kernel_shape=[2, 2], strides=[2, 2]),
            node("Transpose", ["m"], "t", perm=[0, 1, 3, 2]),
            node("Conv", ["t", "v"], "y"),
        ],
        {"x": [1, 4, 8, 8]},
        {"y": [1, 4, 4, 4]},
        {"w": weights(4, 4, 1, 1), "v": weights(4, 4, 1, 1, seed=2)},
    )
    plan = planned(net)
    assert plan.tensors["c"].source == Observed()
    assert plan.tensors["m"].source == Shared("c")
    assert plan.tensors["t"].source == Shared("c")
    assert set(plan.observed) == {"x", "c", "y"}


@pytest.mark.parametrize(("op", "low"), [("Sigmoid", 0.0), ("Softmax", 0.0), ("Tanh", -1.0)])
def test_ranges_known_by_mathematics_are_not_observed(op: str, low: float) -> None:
    # whether or not the operator itself is integer
    net = model(
        [node(op, ["x"], "s"), node("Conv", ["s", "w"], "y")],
        {"x": [1, 4, 8, 8]},
        {"y": [1, 4, 8, 8]},
        {"w": weights(4, 4, 1, 1)},
    )
    assert planned(net).tensors["s"].source == Fixed(low, 1.0)


class TestReasons:
    def test_every_float_node_has_one(self) -> None:
        net = model(
            [
                node("Conv", ["x", "w"], "c"),
                node("Tanh", ["c"], "t"),
                node("Erf", ["t"], "y"),
            ],
            {"x": [1, 4, 8, 8]},
            {"y": [1, 4, 8, 8]},
            {"w": weights(4, 4, 1, 1)},
        )
        left = planned(net).left_float
        assert left["Tanh_t"] == "onnxruntime CPU has no integer kernel for Tanh"
        assert left["Erf_y"] == "onnxruntime CPU has no integer kernel for Erf"

    def test_small_models_do_not_pay(self) -> None:
        net = conv_chain(channels=4, size=4)
        left = planned(net, target=ORT_CPU).left_float
        assert "float is faster here" in left["Conv_c0"]

    def test_large_ones_do(self) -> None:
        plan = planned(conv_chain(channels=64, size=32), target=ORT_CPU)
        assert plan.quantized == ("Conv_c0", "Conv_c1", "Conv_c2")
        assert not plan.left_float

    def test_run_time_weights(self) -> None:
        net = model(
            [node("Conv", ["x", "w"], "y")],
            {"x": [1, 4, 8, 8], "w": [4, 4, 1, 1]},
            {"y": [1, 4, 8, 8]},
        )
        assert "weight 'w' is computed at run time" in planned(net).left_float["Conv_y"]


class TestNoise:
    """A price on rounding moves elementwise islands to float, linear kernels stay."""

    def silu(self) -> onnx.ModelProto:
        constants = {f"w{k}": weights(64, 64, 3, 3, seed=k) for k in range(2)}
        nodes = [
            node("Conv", ["x", "w0"], "a", pads=[1] * 4),
            node("Sigmoid", ["a"], "g"),
            node("Mul", ["a", "g"], "s"),
            node("Conv", ["s", "w1"], "y", pads=[1] * 4),
        ]
        shape = [1, 64, 40, 40]
        return model(nodes, {"x": shape}, {"y": shape}, constants)

    def test_cheap(self) -> None:
        plan = planned(self.silu(), target=ORT_CPU, weighing=Weighing(noise=0.0, least=0.0))
        assert plan.quantized == ("Conv_a", "Sigmoid_g", "Mul_s", "Conv_y")

    def test_dear(self) -> None:
        plan = planned(self.silu(), target=ORT_CPU, weighing=Weighing(noise=10.0))
        assert plan.quantized == ("Conv_a", "Conv_y")


class TestRules:
    def test_by_name_pattern(self) -> None:
        plan = planned(conv_chain(), Rule(nodes="Conv_c[01]", keep_float=True))
        assert plan.quantized == ("Conv_c2",)
        assert plan.left_float["Conv_c0"] == "a rule keeps 'Conv_c[01]' float"

    def test_by_operator(self) -> None:
        plan = planned(residual(), Rule(op_types=("Add",), keep_float=True))
        assert "Add_s" in plan.left_float
        assert len(plan.quantized) == 3

    def test_only_what_is_named(self) -> None:
        first = Rule(nodes="Conv_c0", only=True)
        plan = planned(conv_chain(), first)
        assert plan.quantized == ("Conv_c0",)
        assert plan.placement.units[0].clamp == "Relu_r0"  # goes with its convolution
        assert plan.left_float["Conv_c1"] == "no rule with only=True names it"
        both = planned(conv_chain(), first, Rule(nodes="Conv_c1", only=True))
        assert both.quantized == ("Conv_c0", "Conv_c1")
        every = (Rule(op_types=("Conv",), only=True), Rule(nodes="Conv_c1", keep_float=True))
        plan = planned(conv_chain(), *every)
        assert plan.quantized == ("Conv_c0", "Conv_c2")
        assert plan.left_float["Conv_c1"] == "a rule keeps 'Conv_c1' float"

    def test_by_tensor(self) -> None:
        plan = planned(residual(), Rule(tensors="ar", keep_float=True))
        # whatever makes or reads the tensor stays float
        assert {"Conv_b", "Add_s", "Relu_ar"} <= set(plan.left_float)
        assert "ar" not in plan.tensors

    def test_nodes_of_the_users_model_that_became_part_of_another(self) -> None:
        net = model(
            [
                node("MatMul", ["x", "w"], "m"),
                node("Add", ["m", "b"], "a"),
                node("Relu", ["a"], "r"),
                node("MatMul", ["r", "v"], "y"),
            ],
            {"x": [8, 64]},
            {"y": [8, 64]},
            {"w": weights(64, 64), "b": weights(1, 64)[0], "v": weights(64, 64, seed=3)},
        )
        assert len(planned(net).quantized) == 2
        for name in ("MatMul_m", "Add_a"):
            assert len(planned(net, Rule(nodes=name, keep_float=True)).quantized) == 1
            assert len(planned(net, Rule(nodes=name, only=True)).quantized) == 1

    @pytest.mark.parametrize("name", ["Add_a", "Clip_l", "Mul_m", "Div_h"])
    def test_any_part_of_a_hard_swish_names_the_whole(self, name: str) -> None:
        net = model(
            [
                node("Add", ["x", "three"], "a"),
                node("Clip", ["a", "zero", "six"], "l"),
                node("Mul", ["x", "l"], "m"),
                node("Div", ["m", "six"], "h"),
                node("Conv", ["h", "w"], "y"),
            ],
            {"x": [1, 4, 8, 8]},
            {"y": [1, 4, 8, 8]},
            {
                "w": weights(4, 4, 1, 1),
                "zero": np.float32(0),
                "three": np.float32(3),
                "six": np.float32(6),
            },
        )
        left = planned(net, Rule(nodes=name, keep_float=True)).left_float
        assert f"a rule keeps '{name}' float" in left.values()

    def test_a_tensor_behind_a_clamp_pins_the_whole_unit(self) -> None:
        plan = planned(conv_chain(), Rule(tensors="r1", keep_float=True))
        assert plan.quantized == ("Conv_c0",)

    def test_per_channel_for_one_weight(self) -> None:
        scheme = Scheme(per_channel=False, rules=(Rule(tensors="w1", per_channel=True),))
        plan = make_plan(prepare(conv_chain()), scheme, FORCED)
        assert [plan.tensors[f"w{k}"].spec.axis for k in range(3)] == [None, 0, None]

    def test_types_ranges_and_scales(self) -> None:
        plan = planned(
            conv_chain(),
            Rule(tensors="r0", range=(0.0, 3.0)),
            Rule(tensors="x", scale=0.05, zero_point=128),
            Rule(tensors="w1", per_channel=False),
        )
        assert plan.tensors["r0"].source == Fixed(0.0, 3.0)
        given = plan.tensors["x"].source
        assert isinstance(given, Given)
        assert given.params.scale == np.float32(0.05)
        assert plan.tensors["w1"].spec.axis is None
        assert plan.tensors["w0"].spec.axis == 0

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            (Rule(nodes="Conv_c9", keep_float=True), r"matches no node.*Nearest names: Conv_c0"),
            (Rule(op_types=("Cov",), keep_float=True), r"matches no node.*Nearest names: Conv"),
            (Rule(tensors="r9", range=(0, 1)), r"matches no tensor.*Nearest names: r0"),
            (Rule(nodes="(", keep_float=True), "not a regular expression"),
            (Rule(tensors="b0", range=(0, 1)), "'b0' is a bias"),
            (Rule(tensors="c0", range=(0, 1)), "nothing reads or writes it as integers"),
            (Rule(tensors="x", scale=[0.1, 0.2], zero_point=[0, 0]), "one scale for all of it"),
            (Rule(tensors="x", per_channel=True), "no output channels"),
            (Rule(tensors="x", scale=-1.0, zero_point=0), "above 0"),
            (Rule(tensors="x", scale=1.0, zero_point=300), "zero point 300"),
            (Rule(tensors="x", scale=1.0, zero_point=3, symmetric=True), "wants zero point 128"),
            (Rule(tensors="w0", scale=1.0, zero_point=0, per_channel=True), "one scale and per_ch"),
            (Rule(tensors="w0", dtype=INT16), "no integer kernels for int16 weights.*'w0'"),
            (Rule(tensors="w0", dtype=INT32), "no integer kernels for int32 weights.*'w0'"),
            (Rule(tensors="w0", dtype=IntType("int7", 7, True)), "no integer kernels for int7"),
            (Rule(tensors="x|[cr].*", dtype=UINT16), "no integer kernels for uint16 activations"),
        ],
    )
    def test_rules_that_cannot_be_followed(self, rule: Rule, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            planned(conv_chain(), rule)

    @pytest.mark.parametrize(
        "wrong",
        [
            {},
            {"keep_float": True},
            {"nodes": "a", "tensors": "b", "keep_float": True},
            {"nodes": "a"},
            {"nodes": "a", "range": (0, 1)},
            {"nodes": "a", "only": True, "keep_float": True},
            {"tensors": "a", "only": True},
            {"tensors": "a", "scale": 1.0},
            {"tensors": "a", "scale": 1.0, "zero_point": 0, "range": (0, 1)},
            {"tensors": "a", "range": (1, 1)},
        ],
    )
    def test_rules_that_say_nothing_or_too_much(self, wrong: dict) -> None:
        with pytest.raises(ConfigError):
            Rule(**wrong)


class TestSizesThatTheModelLeavesOpen:
    def net(self) -> onnx.ModelProto:
        return model(
            [
                node("Gemm", ["x", "w"], "h"),
                node("Relu", ["h"], "r"),
                node("Gemm", ["r", "v"], "y"),
            ],
            {"x": ["batch", 64]},
            {"y": ["batch", 64]},
            {"w": weights(64, 64), "v": weights(64, 64, seed=3)},
        )

    def test_are_those_of_the_sample(self) -> None:
        small = planned(self.net(), target=ORT_CPU, seen={"x": (1, 64)})
        large = planned(self.net(), target=ORT_CPU, seen={"x": (512, 64)})
        assert not small.quantized
        assert large.quantized == ("Gemm_h", "Gemm_y")

    def test_samples_of_about_the_same_size_give_the_same_plan(self) -> None:
        plans = [planned(self.net(), target=ORT_CPU, seen={"x": (n, 64)}) for n in (400, 512, 600)]
        assert len({p.quantized for p in plans}) == 1


class TestTypes:
    def test_symmetric_activations_leave_the_relu_to_itself(self) -> None:
        scheme = Scheme(activation=QuantSpec(dtype=UINT8, symmetric=True))
        plan = make_plan(prepare(conv_chain()), scheme, FORCED)
        assert "Relu_r0" in plan.left_float
        assert "c0" in plan.tensors

    def test_the_target_refuses_what_it_has_no_kernels_for(self) -> None:
        scheme = Scheme(activation=QuantSpec(dtype=UINT16))
        with pytest.raises(ConfigError, match=r"no integer kernels for uint16 activations.*uint8"):
            make_plan(prepare(conv_chain()), scheme, ORT_CPU)

    def test_int8_by_uint8_has_no_kernel(self) -> None:
        scheme = Scheme(activation=QuantSpec(dtype=INT8), weight=QuantSpec(dtype=UINT8))
        with pytest.raises(ConfigError, match="no kernel that multiplies int8 activations by uint"):
            make_plan(prepare(conv_chain()), scheme, ORT_CPU)
        assert make_plan(prepare(conv_chain()), scheme, PORTABLE).quantized

    def test_the_portable_target_takes_them(self) -> None:
        scheme = Scheme(activation=QuantSpec(dtype=INT16, symmetric=True))
        plan = make_plan(prepare(conv_chain()), scheme, PORTABLE)
        assert plan.tensors["x"].spec.dtype == INT16

    def test_defaults(self) -> None:
        plan = planned(conv_chain())
        assert plan.tensors["x"].spec == QuantSpec(dtype=UINT8)
        flat = make_plan(prepare(conv_chain()), Scheme(per_channel=False), FORCED)
        assert flat.tensors["w0"].spec.axis is None
        assert flat.tensors["b0"].spec.axis is None


def test_planning_is_linear_in_nodes() -> None:
    """Ten times the nodes, about ten times the time; far below 2 s per 1,000 nodes."""
    from time import perf_counter

    def seconds(depth: int) -> float:
        prepared = prepare(conv_chain(channels=8, size=8, depth=depth))
        start = perf_counter()
        make_plan(prepared, target=replace(ORT_CPU, name="timed"))
        return perf_counter() - start

    seconds(10)
    assert seconds(1000) < 4.0


def test_a_max_pool_goes_with_what_is_before_it() -> None:
    """On integers right behind a Q it would run in channels-first layout, fifty times as slow."""
    constants = {"s": weights(32, 3, 3, 3), "w": weights(64, 32, 3, 3), "v": weights(64, 64, 3, 3)}
    net = model(
        [
            node("Conv", ["x", "s"], "c", pads=[1] * 4),
            node("MaxPool", ["c"], "m", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
            node("Conv", ["m", "w"], "d", pads=[1] * 4),
            node("Conv", ["d", "v"], "y", pads=[1] * 4),
        ],
        {"x": [1, 3, 96, 96]},
        {"y": [1, 64, 48, 48]},
        constants,
    )
    rule = Rule(nodes="Conv_c", keep_float=True)
    assert set(planned(net, rule, target=ORT_CPU).quantized) == {"Conv_d", "Conv_y"}
    chosen = planned(net, target=ORT_CPU).quantized
    assert ("MaxPool_m" in chosen) == ("Conv_c" in chosen)


class TestUnitsAreNeverSplit:
    def test_hard_swish_stays_float_on_every_target(self) -> None:
        net = model(
            [
                node("Conv", ["x", "w"], "c"),
                node("HardSwish", ["c"], "h"),
                node("Conv", ["h", "v"], "y"),
            ],
            {"x": [1, 8, 8, 8]},
            {"y": [1, 8, 8, 8]},
            {"w": weights(8, 8, 1, 1), "v": weights(8, 8, 1, 1, seed=4)},
        )
        for target in (FORCED, PORTABLE):
            plan = planned(net, target=target)
            assert plan.quantized == ("Conv_c", "Conv_y")
            assert all("part of a hard-swish" in reason for reason in plan.left_float.values())

    @pytest.mark.parametrize("noise", [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 1.0])
    def test_a_swish_is_integer_or_float_as_a_whole(self, noise: float) -> None:
        plan = planned(TestNoise().silu(), target=ORT_CPU, weighing=Weighing(noise=noise))
        assert len({"Sigmoid_g", "Mul_s"} & set(plan.quantized)) in (0, 2)

    def test_what_a_subgraph_captures_counts_as_float_reader(self) -> None:
        branch = onnx.helper.make_graph(
            [onnx.helper.make_node("Neg", ["s"], ["n"], name="n")],
            "branch",
            [],
            [onnx.helper.make_tensor_value_info("n", 1, None)],
        )
        net = TestNoise().silu()
        net.graph.node.append(node("If", ["yes"], "z", then_branch=branch, else_branch=branch))
        net.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
        net.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, None))
        plan = make_plan(prepare(net), target=ORT_CPU, weighing=Weighing(noise=0.15))
        alone = make_plan(
            prepare(TestNoise().silu()), target=ORT_CPU, weighing=Weighing(noise=0.15)
        )
        assert set(plan.quantized) <= set(alone.quantized)


def test_a_constant_operand_has_the_type_of_the_others() -> None:
    nodes = [node("Conv", ["x", "w"], "c"), node("Add", ["c", "k"], "y")]
    constants = {"w": weights(4, 4, 1, 1), "k": weights(1, 4, 8, 8)}
    net = model(nodes, {"x": [1, 4, 8, 8]}, {"y": [1, 4, 8, 8]}, constants)
    with pytest.raises(ConfigError, match=r"no kernel for Add that mixes types .*'k' int8"):
        planned(net, Rule(tensors="k", dtype=INT8))


@pytest.mark.parametrize(("terms", "integer"), [(33_025, True), (33_026, False)])
@pytest.mark.parametrize("target", [FORCED, PORTABLE], ids=["ort", "portable"])
def test_sums_of_products_of_activations_stay_within_int32(
    terms: int, integer: bool, target: Target
) -> None:
    """255 * 255 * 33,026 is above 2**31: of codes at the ends, the sum would change its sign."""
    shapes = {"a": [2, terms], "b": [terms, 3]}
    net = model([node("MatMul", ["a", "b"], "y")], shapes, {"y": [2, 3]})
    data = [{n: np.ones(s, np.float32) for n, s in shapes.items()}]
    result, outcome = quantized(net, data, target=target)
    assert bool(result.plan.quantized) == integer
    assert outcome.sqnr > 40
    assert integer or "can overflow" in result.left_float["MatMul_y"]


def test_one_kernel_wants_one_activation_type() -> None:
    rule = Rule(tensors="r0", dtype=INT8)
    with pytest.raises(ConfigError, match=r"no kernel for Conv that mixes types \('r0' int8"):
        planned(conv_chain(), rule)
    mixed = planned(conv_chain(), rule, target=PORTABLE)
    assert mixed.tensors["r0"].spec.dtype == INT8


def amid_float(op: str, *, readers: int = 1, channels: int = 80) -> onnx.ModelProto:
    """A convolution that pays on integers by a little, and float readers of what it makes."""
    shape = [1, channels, 20, 20]
    names = [f"y{k}" for k in range(readers)]
    nodes = [node("Tanh", ["x"], "t"), node("Conv", ["t", "w"], "c")]
    nodes += [node(op, ["c"], y) for y in names]
    w = weights(channels, channels, 1, 1)
    return model(nodes, {"x": shape}, dict.fromkeys(names, shape), {"w": w})


@pytest.mark.parametrize(
    ("net", "integer"),
    [
        (amid_float("Erf"), True),
        (amid_float("Erf", readers=4), False),  # a DQ, and a change of layout, for each of them
        (amid_float("HardSwish"), False),  # a float convolution does that on the way
        (amid_float("HardSwish", channels=256), True),  # measured: 77 of 266 µs less
    ],
    ids=["one reader", "four readers", "fused activation", "fused, larger"],
)
def test_what_is_behind_a_convolution_counts(net: onnx.ModelProto, integer: bool) -> None:
    plan = planned(net, target=ORT_CPU, weighing=Weighing(noise=0, least=0))
    assert ("Conv_c" in plan.quantized) == integer


@pytest.mark.parametrize("op", ["Sigmoid", "LeakyRelu", "HardSigmoid", "Tanh"])
@pytest.mark.parametrize("clamp", ["Relu", "Clip"])
def test_a_clamp_behind_an_activation_of_a_convolution(op: str, clamp: str) -> None:
    nodes = [
        node("Conv", ["x", "w"], "c", pads=[1] * 4),
        node(op, ["c"], "a"),
        node(clamp, ["a"], "y"),
    ]
    shape = [1, 32, 16, 16]
    net = model(nodes, {"x": shape}, {"y": shape}, {"w": weights(32, 32, 3, 3)})
    assert len(make_plan(prepare(net)).placement.units) >= 2


@pytest.mark.parametrize("later", [{"dtype": INT8}, {"symmetric": True}], ids=str)
def test_a_given_scale_and_a_later_type(later: dict) -> None:
    rules = Rule(tensors="x", scale=0.05, zero_point=100), Rule(tensors="x|r0", **later)
    message = r"'x' was given .* as asymmetric uint8 by an earlier rule, and is .* by a later one"
    with pytest.raises(ConfigError, match=message):
        planned(conv_chain(), *rules, target=PORTABLE)


def test_attention_over_many_keys_keeps_its_weights() -> None:
    """Of a thousand keys none may get a tenth: steps of 1/255 would make zeros of nearly all."""
    n, d = 512, 32
    nodes = [
        node("MatMul", ["x", "a"], "q"),
        node("MatMul", ["x", "b"], "k"),
        node("Transpose", ["k"], "t", perm=[0, 2, 1]),
        node("MatMul", ["q", "t"], "s"),
        node("Mul", ["s", "c"], "z"),
        node("Softmax", ["z"], "p", axis=-1),
        node("MatMul", ["p", "x"], "y"),
    ]
    constants = {"a": weights(d, d), "b": weights(d, d, seed=5), "c": np.float32(d**-0.5)}
    net = model(nodes, {"x": [1, n, d]}, {"y": [1, n, d]}, constants)
    _, outcome = quantized(net, feeds({"x": [1, n, d]}, 4))
    assert outcome.sqnr > 25


@pytest.mark.parametrize("shown", [True, False])
def test_probabilities_that_are_shown_keep_their_range(shown: bool) -> None:
    nodes = [node("Softmax", ["x"], "p", axis=-1), node("MatMul", ["p", "w"], "y")]
    outputs = {"y": [64, 8]} | ({"p": [64, 64]} if shown else {})
    net = model(nodes, {"x": [64, 64]}, outputs, {"w": weights(64, 8)})
    source = make_plan(prepare(net), target=FORCED).tensors["p"].source
    assert isinstance(source, Fixed if shown else Observed)
