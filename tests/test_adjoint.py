"""Energies found on the way back are those of finite differences, and tell harm from noise."""

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import onnx
import pytest
from harness import older
from hypothesis import given
from hypothesis import strategies as st
from models import feeds, node, weights
from models import model as build_model
from onnx import numpy_helper, parser

import qdq
from qdq.api import collect_statistics
from qdq.placement import gains, harm
from qdq.placement.adjoint import adjoint
from qdq.placement.harm import COMMON, LONE, POSITIONS
from qdq.session import run
from qdq.statistics.few import SAMPLES, FewSamples
from qdq.statistics.observe import Observer

STEP = 2.0**-7

# text, the shape of x, constants: shapes of random ones, or values
Case = tuple[str, tuple[int, ...], dict[str, Any]]
FLAT, IMAGE, SIGNAL = (4, 6), (1, 2, 3, 4), (1, 2, 12)
K3: dict[str, Any] = {"w": (3, 2, 3, 3)}


def values(*numbers: float, kind: Any = np.float32) -> np.ndarray:
    return np.array(numbers, kind)


def whole(*numbers: int) -> np.ndarray:
    return values(*numbers, kind=np.int64)


SIGNED: list[Case] = [
    *(
        (f"y = {op}(x)", FLAT, {})
        for op in (
            "Relu", "LeakyRelu<alpha=0.2>", "HardSigmoid<alpha=0.4>", "Sigmoid", "Tanh", "Exp",
            "Abs", "Gelu", 'Gelu<approximate="tanh">', "Elu<alpha=0.7>", "Erf", "HardSwish",
            "Softplus", "Celu", "Mish", "Selu", "Softsign", "Neg", "Identity", "Cast<to=1>",
            "Softmax", "Softmax<axis=0>", "LogSoftmax", "LogSoftmax<axis=0>", "Sin", "Cos", "Atan",
            "Asinh", "Shrink<lambd=0.3,bias=0.1>", "Trilu", "Trilu<upper=0>",
        )
    ),
    ("y = PRelu(x, s)", FLAT, {"s": (6,)}),
    ("y = Clip(x, a, b)", FLAT, {"a": np.float32(-1), "b": np.float32(0.7)}),
    ("y = Clip(x, , b)", FLAT, {"b": np.float32(0.7)}),
    ("y = Pow(x, p)", FLAT, {"p": np.float32(2)}),
    ("y = Pow(x, p)", FLAT, {"p": np.int64(3)}),
    *(("t = Relu(x) y = Pow(t, p)", FLAT, {"p": np.float32(p)}) for p in (0, 0.5, 0.75, 1, 1.5)),
    ("y = Add(x, c)", FLAT, {"c": (3, 1, 6)}),
    ("y = Add(x, c)", (4, 1), {"c": (5,)}),
    ("y = Sum(x, c, x)", (4, 1), {"c": (5,)}),
    ("y = Mean(x, c, x)", (4, 1), {"c": (5,)}),
    ("y = Mean(x, c)", (4, 1), {"c": (5,)}),
    ("y = Mean(x)", FLAT, {}),
    ("y = Sub(c, x)", (6,), {"c": (3, 6)}),
    ("y = Mul(x, c)", (4, 1, 2), {"c": (3, 2)}),
    ("y = Mul(x, x)", FLAT, {}),
    ("t = Tanh(x) r = ReduceMax(x, k) y = Mul(t, r)", FLAT, {"k": whole(1)}),
    ("t = Tanh(x) r = ReduceMean(x, k) y = Sub(t, r)", FLAT, {"k": whole(0)}),
    ("t = Exp(x) r = ReduceSum(t, k) y = Div(t, r)", FLAT, {"k": whole(1)}),
    ("y = Max(x, c)", FLAT, {"c": values(0.0)}),
    ("t = Neg(x) y = Min(x, t, c)", FLAT, {"c": values(-0.3)}),
    ("m = Greater(x, z) t = Sin(c) y = Where(m, x, t)", FLAT, {"z": values(0.0), "c": (6,)}),
    ("m = Less(c, z) t = Exp(x) y = Where(m, x, t)", FLAT, {"z": values(0.1), "c": (6,)}),
    ("y = LayerNormalization(x, s, b)", FLAT, {"s": (6,), "b": (6,)}),
    ("y = LayerNormalization<axis=1>(x, s)", (2, 3, 4), {"s": (3, 4)}),
    ("y = LRN<size=3,alpha=0.5,beta=0.6,bias=0.7>(x)", (1, 5, 2, 3), {}),
    ("y = LRN<size=5,alpha=0.3>(x)", (2, 4, 1, 3), {}),
    ("y = RMSNormalization<epsilon=0.1>(x, s)", FLAT, {"s": (6,)}),
    ("y = RMSNormalization<axis=1>(x, s)", (2, 3, 4), {"s": (3, 4)}),
    ("g = GroupNormalization<num_groups=2,epsilon=0.1>(x, s, b) y = Identity(g)", (2, 4, 3),
     {"s": (4,), "b": (4,)}),
    ("y = InstanceNormalization<epsilon=0.1>(x, s, b)", IMAGE, {"s": (2,), "b": (2,)}),
    ("y = InstanceNormalization(x, s, b)", (2, 3, 7), {"s": (3,), "b": (3,)}),
    ("y = BatchNormalization<epsilon=0.1>(x, s, b, m, v)", IMAGE,
     {"s": (2,), "b": (2,), "m": (2,), "v": values(0.5, 2)}),
    *(
        (f"y = Reduce{kind}<keepdims={keep}>(x, k)", (2, 3, 4), {"k": axes})
        for kind in ("Sum", "Mean", "Max", "Min", "L1", "L2", "LogSumExp", "SumSquare")
        for keep, axes in ((0, whole(1)), (1, whole(-1, 0)))
    ),
    ("y = ReduceMean<keepdims=0>(x)", FLAT, {}),
    ("t = Where(m, x, low) r = ReduceLogSumExp(t, k) y = Exp(r)", (3, 2),
     {"m": values(1, 0, 0, 0, 1, 1, kind=bool).reshape(3, 2), "low": values(-np.inf),
      "k": whole(1)}),
    ("y = Conv(x, w, b)", (1, 2, 4, 5), {**K3, "b": (3,)}),
    ("y = Conv<pads=[1,0,2,1]>(x, w)", (1, 2, 3, 4), K3),
    ("y = Conv<strides=[2,2],pads=[1,1,1,1]>(x, w)", (1, 2, 5, 4), K3),
    ("y = Conv<strides=[2,2]>(x, w)", (1, 2, 4, 5), K3),
    ("y = Conv<strides=[2,2],pads=[0,1,1,2]>(x, w)", (1, 2, 6, 3), K3),
    ("y = Conv<strides=[3,1],pads=[1,1,0,0]>(x, w)", (1, 2, 6, 3), K3),
    ("y = Conv<strides=[2,1],dilations=[1,2],pads=[1,2,1,0]>(x, w)", (1, 2, 4, 5), K3),
    ("y = Conv<strides=[3,2],dilations=[2,1],pads=[1,0,2,1]>(x, w)", (1, 2, 6, 4), K3),
    ("y = Conv<strides=[2,2]>(x, w)", (1, 4, 3, 4), {"w": (3, 4, 1, 1)}),
    ("y = Conv<group=2,pads=[1,1,1,1]>(x, w)", (1, 4, 3, 2), {"w": (6, 2, 3, 3)}),
    ("y = Conv<group=4,strides=[2,2],pads=[1,1,1,1]>(x, w)", (1, 4, 3, 4), {"w": (4, 1, 3, 3)}),
    ("y = Conv<group=2>(x, w)", (2, 2, 9), {"w": (4, 1, 4)}),
    ("y = Conv<pads=[1,0,2,1]>(x, w, b)", (1, 9, 3, 4), {"w": (2, 9, 3, 2), "b": (2,)}),
    ("y = Conv<group=2,pads=[1,1,1,1]>(x, w)", (1, 8, 3, 2), {"w": (6, 4, 3, 3)}),
    ("y = Conv<group=8,dilations=[2],pads=[2,1]>(x, w)", (2, 8, 6), {"w": (8, 1, 3)}),
    ("y = Conv<pads=[3,2]>(x, w)", SIGNAL, {"w": (3, 2, 2)}),
    ("y = Conv<strides=[2,2],pads=[1,1,0,1]>(x, w)", (1, 8, 4, 3), {"w": (2, 8, 3, 3)}),
    ("y = Conv<pads=[1,3]>(x, w)", (1, 8, 5), {"w": (3, 8, 2)}),
    ("y = Conv<strides=[2],pads=[4,3]>(x, w)", SIGNAL, {"w": (3, 2, 3)}),
    ("y = Conv<dilations=[2],pads=[2,1]>(x, w)", SIGNAL, {"w": (3, 2, 3)}),
    ("y = Conv<strides=[3],pads=[1,0]>(x, w)", (1, 2, 11), {"w": (3, 2, 2)}),
    ("y = Conv<strides=[5],pads=[2,2]>(x, w)", (1, 1, 23), {"w": (3, 1, 8)}),
    ("y = Conv<strides=[7],group=2>(x, w)", (1, 2, 13), {"w": (4, 1, 3)}),
    ('y = Conv<auto_pad="VALID">(x, w)', SIGNAL, {"w": (3, 2, 3)}),
    ("y = ConvTranspose<strides=[2,1],pads=[1,0,0,1],output_padding=[1,0]>(x, w)", IMAGE,
     {"w": (2, 3, 3, 2)}),
    ("y = ConvTranspose<group=2,dilations=[2]>(x, w)", (1, 4, 5), {"w": (4, 2, 3)}),
    ("y = MatMul(x, w)", (2, 3, 4), {"w": (4, 5)}),
    ("y = MatMul(w, x)", (3, 4), {"w": (2, 5, 3)}),
    ("y = MatMul(x, w)", (2, 1, 3, 4), {"w": (3, 4, 2)}),
    ("y = MatMul(x, w)", (4,), {"w": (4, 5)}),
    ("y = MatMul(w, x)", FLAT, {"w": (2, 3, 4)}),
    ("t = Transpose<perm=[0,2,1]>(x) u = Tanh(x) y = MatMul(u, t)", (2, 3, 4), {}),
    ("t = Transpose<perm=[0,2,1]>(x) s = ReduceSum<keepdims=0>(x, k) y = MatMul(s, t)",
     (2, 3, 4), {"k": whole(0)}),
    ("y = Gemm<transB=1,alpha=0.5>(x, w, b)", FLAT, {"w": (5, 6), "b": (5,)}),
    ("y = Gemm<alpha=2.0,beta=0.5>(x, w, b)", FLAT, {"w": (6, 5), "b": (5,)}),
    ("y = Gemm(x, w)", FLAT, {"w": (6, 5)}),
    ('y = Einsum<equation="bchw,bkc->bkhw">(x, w)', (2, 2, 3, 4), {"w": (2, 3, 2)}),
    ('t = Tanh(x) y = Einsum<equation="bc,kc,k->bk">(x, t, w)', FLAT, {"w": (4,)}),
    ('y = Einsum<equation="abc->cab">(x)', (2, 1, 4), {}),
    ('y = Einsum<equation="...si,...id->...sd">(x, w)', (2, 3, 4), {"w": (2, 4, 2)}),
    ('s = ReduceSum<keepdims=0>(x, k) y = Einsum<equation="...i,ij->...j">(x, s)', (2, 3, 3),
     {"k": whole(0)}),
    ('y = Einsum<equation="ca,ab">(x, w)', FLAT, {"w": (6, 3)}),
    ('y = Einsum<equation="jk,k...">(w, x)', (3, 4, 2), {"w": (5, 3)}),
    ('t = Tanh(x) y = Einsum<equation="ab,ab->">(x, t)', FLAT, {}),
    ("y = GlobalAveragePool(x)", (2, 2, 3, 4), {}),
    ("y = GlobalMaxPool(x)", (2, 2, 3, 4), {}),
    ("y = AveragePool<kernel_shape=[2,2],strides=[1,2]>(x)", IMAGE, {}),
    ("y = AveragePool<kernel_shape=[3,2],pads=[1,1,1,0]>(x)", IMAGE, {}),
    ("y = AveragePool<kernel_shape=[3],pads=[1,1],strides=[2],count_include_pad=1>(x)", SIGNAL,
     {}),
    ("y = AveragePool<kernel_shape=[2,2],strides=[2,2],ceil_mode=1>(x)", (1, 2, 2, 4), {}),
    ("y = AveragePool<kernel_shape=[3],strides=[2],ceil_mode=1,pads=[1,1]>(x)", (1, 2, 7), {}),
    ("y = AveragePool<kernel_shape=[2,3],strides=[2,3],ceil_mode=1,pads=[0,1,1,0]>(x)",
     (2, 2, 5, 6), {}),
    ("y = AveragePool<kernel_shape=[2],strides=[4],ceil_mode=1,dilations=[2]>(x)", (1, 2, 9), {}),
    ("y = MaxPool<kernel_shape=[2,3],pads=[0,1,1,0],strides=[1,2]>(x)", (2, 2, 3, 4), {}),
    ("y = MaxPool<kernel_shape=[2,2],ceil_mode=1,strides=[2,2],storage_order=1>(x)", IMAGE, {}),
    ("y = Reshape(x, s)", FLAT, {"s": whole(-1, 3)}),
    ("y = Flatten<axis=2>(x)", IMAGE, {}),
    ("y = Squeeze(x, k)", IMAGE, {"k": whole(0)}),
    ("y = Unsqueeze(x, k)", FLAT, {"k": whole(0, 2)}),
    ("y = Transpose<perm=[2,0,3,1]>(x)", IMAGE, {}),
    ("y = Transpose(x)", (2, 3, 4), {}),
    ("t = Exp(x) y = Concat<axis=-1>(x, c, t)", FLAT, {"c": (4, 2)}),
    ("a, b, c = Split<axis=1>(x, n) t = Exp(c) y = Add(a, t)", FLAT, {"n": whole(2, 2, 2)}),
    ("y = Pad(x, p)", FLAT, {"p": whole(1, 0, 2, 3)}),
    ("y = Pad(x, p)", FLAT, {"p": whole(1, -2, -1, 3)}),
    ("y = Pad(x, p, v)", FLAT, {"p": whole(1, 0, 0, 0), "v": np.float32(2)}),
    ("y = Pad(x, p, , k)", FLAT, {"p": whole(1, 2), "k": whole(1)}),
    ('y = Pad<mode="reflect">(x, p)', FLAT, {"p": whole(1, 3, 2, 1)}),
    ('y = Pad<mode="edge">(x, p, , k)', (2, 3, 4), {"p": whole(1, 2, 0, 3), "k": whole(2, 1)}),
    ('y = Pad<mode="wrap">(x, p)', FLAT, {"p": whole(0, 2, 0, 3)}),
    ("y, i = TopK(x, n)", FLAT, {"n": whole(3)}),
    ("y, i = TopK<axis=0,largest=0>(x, n)", FLAT, {"n": whole(2)}),
    ("u = Slice(x, o, b) t = Tanh(u) y = ScatterElements<axis=1>(x, i, t)", FLAT,
     {"i": whole(0, 5, 3, 1, 2, 2, 4, 0).reshape(4, 2), "o": whole(0, 0), "b": whole(4, 2)}),
    ('u = Slice(x, o, b) y = ScatterElements<axis=1,reduction="add">(c, i, u)', FLAT,
     {"i": whole(0, 5, 5, 1, 2, 2, 4, 0).reshape(4, 2), "o": whole(0, 0), "b": whole(4, 2),
      "c": FLAT}),
    ("u = Slice(x, o, b) t = Exp(u) y = ScatterND(x, i, t)", FLAT,
     {"i": whole(3, 0).reshape(2, 1), "o": whole(0, 0), "b": whole(2, 6)}),
    ('u = Slice(x, o, b) y = ScatterND<reduction="add">(x, i, u)', FLAT,
     {"i": whole(3, 3).reshape(2, 1), "o": whole(0, 0), "b": whole(2, 6)}),
    *((f"y = CumSum<reverse={r},exclusive={e}>(x, k)", FLAT, {"k": np.int64(1)})
      for r in (0, 1) for e in (0, 1)),
    ("y = Col2Im<strides=[2,1],pads=[1,0,0,1]>(x, s, k)", (2, 12, 8),
     {"s": whole(3, 4), "k": whole(2, 2)}),
    ("y = Col2Im(x, s, k)", (1, 6, 3), {"s": whole(3, 2), "k": whole(1, 2)}),
    ("y = Slice(x, a, b, k, s)", FLAT,
     {"a": whole(5, 0), "b": whole(0, 3), "k": whole(1, 0), "s": whole(-2, 1)}),
    ("y = Gather<axis=1>(x, i)", FLAT, {"i": whole(0, 3, 3)}),
    ("y = GatherElements<axis=0>(x, i)", FLAT, {"i": whole(0, 3, 3, 1, 2, -1).reshape(1, 6)}),
    ("y = GatherND(x, i)", FLAT, {"i": whole(0, 3, 3, 1, 3, 3).reshape(3, 2)}),
    ("y = Expand(x, s)", (4, 1), {"s": whole(2, 1, 3)}),
    ("y = Tile(x, n)", FLAT, {"n": whole(2, 3)}),
    ("y = DepthToSpace<blocksize=2>(x)", (1, 8, 2, 2), {}),
    ('y = DepthToSpace<blocksize=2,mode="CRD">(x)', (1, 8, 2, 1), {}),
    ("y = SpaceToDepth<blocksize=2>(x)", (1, 2, 4, 4), {}),
    ('y = Resize<mode="nearest">(x, , f)', IMAGE, {"f": values(1, 1, 2, 3)}),
    ('y = Resize<mode="nearest">(x, , , s)', (1, 2, 3, 2), {"s": whole(1, 2, 6, 6)}),
    ('y = Resize<mode="nearest">(x, , f)', (1, 2, 3, 2), {"f": values(1, 2, 2, 2)}),
    ('y = Resize<mode="nearest",coordinate_transformation_mode="align_corners">(x, , f)',
     (1, 2, 3, 2), {"f": values(1, 1, 3, 2)}),
    ('y = Resize<mode="nearest",coordinate_transformation_mode="asymmetric",'
     'nearest_mode="floor">(x, , , s)', IMAGE, {"s": whole(1, 2, 5, 2)}),
]  # fmt: skip
POSITIVE: list[Case] = [
    ("y = Log(x)", FLAT, {}),
    ("y = Sqrt(x)", FLAT, {}),
    ("y = Reciprocal(x)", FLAT, {}),
    ("y = Pow(x, p)", FLAT, {"p": np.float32(-0.5)}),
    ("y = Div(c, x)", FLAT, {"c": (3, 1, 6)}),
    ("y = Div(x, c)", (4, 1), {"c": values(0.5, 2, 3)}),
]


SAMPLED = [
    "",
    "<align_corners=1>",
    '<padding_mode="border">',
    '<padding_mode="border",align_corners=1>',
]
GRID = np.random.default_rng(3).uniform(-1.3, 1.3, (1, 3, 4, 2)).astype(np.float32)
SIGNED += [
    *((f"y = GridSample{kind}(x, g)", IMAGE, {"g": GRID}) for kind in SAMPLED),
    *((f"t = Sin(x) g = Add(t, s) y = GridSample{kind}(c, g)", (1, 3, 2, 2),
       {"c": (1, 2, 3, 4), "s": np.float32(0.03)}) for kind in SAMPLED[:3]),
]  # fmt: skip
HEADS, SIDE = (1, 2, 3, 4), (2, 3, 4)
MASK = np.array([[1, 0, 1], [1, 1, 0], [0, 1, 1]], bool)
QKV = "k = Tanh(x) v = Neg(x)"
LESS = "k = Slice(x, o, e, a) t = Sin(x) v = Slice(t, o, e, a)"
CACHE = {"c": (1, 2, 5, 4), "d": (1, 2, 5, 4)}
SIGNED += [
    (f"{QKV} y = Attention(x, k, v)", HEADS, {}),
    (f"{QKV} y = Attention<scale=0.3>(x, k, v, m)", HEADS, {"m": MASK}),
    (f"{QKV} y = Attention<is_causal=1>(x, k, v, m)", HEADS, {"m": (1, 1, 3, 3)}),
    (f"{QKV} y = Attention(x, k, v, m)", HEADS, {"m": np.where(MASK, 0, -np.inf)
                                                .astype(np.float32)}),
    (f"{QKV} y = Attention<q_num_heads=2,kv_num_heads=2>(x, k, v)", SIDE, {}),
    (f"{LESS} y = Attention(x, k, v)", (1, 4, 3, 2),
     {"o": whole(0), "e": whole(2), "a": whole(1)}),
    (f"{LESS} y = Attention<q_num_heads=4,kv_num_heads=2,is_causal=1>(x, k, v)", (2, 3, 8),
     {"o": whole(0), "e": whole(4), "a": whole(2)}),
    (f"{QKV} y, kk, vv = Attention<is_causal=1>(x, k, v, , c, d)", HEADS, CACHE),
    (f"{QKV} t, kk, vv = Attention(x, k, v, , c, d) y = Concat<axis=2>(t, kk, vv)", HEADS, CACHE),
    (f"{QKV} t, kk, vv = Attention(q, k, v, , x, v) y = Concat<axis=2>(t, vv)", HEADS,
     {"q": HEADS}),
    *((f"y = RotaryEmbedding{kind}(x, c, s, p)", (1, 2, 3, 4),
       {"c": (5, 2), "s": (5, 2), "p": whole(4, 0, 2).reshape(1, 3)})
      for kind in ("", "<interleaved=1>")),
    ("y = RotaryEmbedding<num_heads=2,rotary_embedding_dim=2>(x, c, s)", (1, 3, 8),
     {"c": (1, 3, 1), "s": (1, 3, 1)}),
]  # fmt: skip
LSTM = {"w": (1, 12, 4), "r": (1, 12, 3), "b": (1, 24)}
GRU = {"w": (1, 9, 4), "r": (1, 9, 3), "b": (1, 18)}
TWO_WAYS = {"w": (2, 12, 4), "r": (2, 12, 3), "b": (2, 24), "h": (2, 2, 3), "c": (2, 2, 3)}
GRU_WAYS = {"w": (2, 9, 4), "r": (2, 9, 3), "b": (2, 18), "h": (2, 2, 3)}
RESET = "hidden_size=3,linear_before_reset=1"
SIGNED += [
    ("y = LSTM<hidden_size=3>(x, w, r, b)", (5, 2, 4), LSTM),
    ('y = LSTM<hidden_size=3,direction="reverse">(x, w, r)', (5, 2, 4), LSTM),
    ('y = LSTM<hidden_size=3,activations=["Sigmoid","Tanh","Tanh"]>(x, w, r)', (5, 2, 4), LSTM),
    (", y = LSTM<hidden_size=3>(x, w, r, b)", (5, 2, 4), LSTM),
    (", , y = LSTM<hidden_size=3>(x, w, r, b)", (5, 2, 4), LSTM),
    ('s, i, j = LSTM<hidden_size=3,direction="bidirectional">(x, w, r, b, , h, c)'
     " g = Add(i, j) y = Add(s, g)", (5, 2, 4), TWO_WAYS),
    ("y, e, f = LSTM<hidden_size=3>(a, w, r, b, , x, x)", (1, 2, 3), {**LSTM, "a": (5, 2, 4)}),
    (f"y = GRU<{RESET}>(x, w, r, b)", (5, 2, 4), GRU),
    (f'y = GRU<{RESET},direction="reverse">(x, w, r)', (5, 2, 4), GRU),
    (f", y = GRU<{RESET}>(x, w, r, b)", (5, 2, 4), GRU),
    (f's, e = GRU<{RESET},direction="bidirectional">(x, w, r, b, , h) y = Add(s, e)', (5, 2, 4),
     GRU_WAYS),
    (f"y = GRU<{RESET}>(a, w, r, b, , x)", (1, 2, 3), {**GRU, "a": (5, 2, 4)}),
]  # fmt: skip
NEWER = ("Attention", "RMSNormalization", "RotaryEmbedding")


def build(text: str, shape: tuple[int | str, ...], constants: dict[str, Any], **kinds: Any) -> Any:
    """The text makes y of x."""
    newer = any(op in text for op in NEWER)
    opset, out = kinds.get("opset", 23 if newer else 21), kinds.get("out", "float[] y")
    start = kinds.get("start", "x")
    sizes = ",".join(map(str, shape))
    head = f'<ir_version: 10, opset_import: ["" : {opset}, "mine" : 1]>'
    # onnx does not infer this one's shape; exporters note it
    known = f"<float[{sizes}] g>" if "GroupNormalization" in text else ""
    net = f"net (float[{sizes}] {start}) => ({out}) {known} {{ {text} }}"
    model = parser.parse_model(f"{head} {net}")
    rng = np.random.default_rng(len(text))
    for name, like in constants.items():
        made = rng.standard_normal(like) if isinstance(like, tuple) else like
        made = np.asarray(made, np.float32 if isinstance(like, tuple) else None)
        model.graph.initializer.append(numpy_helper.from_array(made, name))
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def to_one(case: Case, opened: Sequence[int] = ()) -> onnx.ModelProto:
    """Raw values, scaled, are x; that makes a y, and that, weighted, an output of one element.

    Where the gradient of x is right but for its order, that of the raw values is not.
    """
    text, shape, constants = case
    declared = build(text, shape, constants).graph.output[0].type.tensor_type.shape.dim
    weights = np.random.default_rng(5).uniform(-1, 2, [d.dim_value for d in declared])
    end = "weighed = Mul(y, weights) total = ReduceSum<keepdims=0>(weighed)"
    # a factor of known sizes would tell those of x
    start = "sizes = Shape(raw) factors = Reshape(scales, sizes) x = Mul(raw, factors)"
    start = start if opened else "x = Mul(raw, scales)"
    whole_text = f"{start} {text} {end} out = Reshape(total, single)"
    more = {"weights": weights.astype(np.float32), "scales": scales(shape), "single": whole(1, 1)}
    open_shape = tuple(f"n{k}" if k in opened else d for k, d in enumerate(shape))
    return build(whole_text, open_shape, constants | more, start="raw", out="float[1,1] out")


def scales(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(6).uniform(0.5, 1.5, shape).astype(np.float32)


def spread_out(shape: tuple[int, ...], middle: float) -> np.ndarray:
    """Values between middle - 2 and middle + 2, all different, none of them at a kink."""
    size = int(np.prod(shape))
    grid = (np.random.default_rng(size).permutation(size) + 0.5) * 4 / size - 2 + middle
    return grid.reshape(shape).astype(np.float32)


def energies(model: onnx.ModelProto, feed: dict[str, Any], *names: str) -> dict[str, float]:
    found = adjoint(model, names)
    assert found is not None
    made = Observer(model, [found.output], added=found.added).run(feed)[found.output]
    return dict(zip(found.names, made.tolist(), strict=True))


def by_differences(model: onnx.ModelProto, raw: np.ndarray) -> float:
    moves = STEP * np.eye(raw.size, dtype=np.float32).reshape(raw.size, *raw.shape)
    feeds = [{"raw": v} for v in chain([raw], raw + moves, raw - moves)]
    outs = np.array([o["out"].item() for o in run(model, feeds)])
    slopes = (outs[1 : raw.size + 1] - outs[raw.size + 1 :]) / (2 * STEP)
    return float(np.sum(slopes**2) / outs[0] ** 2)


@pytest.mark.parametrize(
    ("case", "middle"),
    [*((c, 0.0) for c in SIGNED), *((c, 2.5) for c in POSITIVE)],
    ids=lambda c: c[0].replace("y = ", "") if isinstance(c, tuple) else "",
)
def test_an_energy_is_that_of_finite_differences(case: Case, middle: float) -> None:
    if "Attention" in case[0] and "vv" not in case[0] and older("1.24"):
        pytest.skip("its weights are only handed out with keys and values of before")
    model, raw = to_one(case), spread_out(case[1], middle) / scales(case[1])
    found = energies(model, {"raw": raw}, "raw")["raw"]
    assert found == pytest.approx(by_differences(model, raw), rel=0.02)


@pytest.mark.parametrize(
    "mode",
    ['"linear"', '"linear",antialias=1', '"cubic",exclude_outside=1',
     '"linear",coordinate_transformation_mode="align_corners"'],
)  # fmt: skip
def test_interpolation_counts_as_nearest(mode: str) -> None:
    """Of a steady image the energies are then nearly the same."""
    size = {"s": whole(1, 1, 4, 4)}
    x = np.ones((1, 1, 8, 8), np.float32)
    found = energies(build(f"y = Resize<mode={mode}>(x, , , s)", x.shape, size), {"x": x}, "x")
    assert found["x"] == pytest.approx(1)


@pytest.mark.parametrize("opened", [(0,), (0, 2), (2,)])
@pytest.mark.parametrize("size", [5, 6, 7])
def test_a_strided_convolution_of_open_size(opened: tuple[int, ...], size: int) -> None:
    case: Case = ("y = Conv<strides=[3],pads=[1,0]>(x, w)", (3, 2, size), {"w": (3, 2, 2)})
    model, raw = to_one(case, opened), spread_out(case[1], 0) / scales(case[1])
    found = energies(model, {"raw": raw}, "raw")["raw"]
    assert found == pytest.approx(by_differences(model, raw), rel=0.02)


def test_a_strided_convolution_that_reads_nothing_but_pads() -> None:
    """Less its pads, what goes back is of size 0."""
    case: Case = ("y = Conv<strides=[3],pads=[1,1]>(x, w)", (2, 3, 1), {"w": (3, 3, 1)})
    model, raw = to_one(case, [2]), spread_out(case[1], 0) / scales(case[1])
    assert energies(model, {"raw": raw}, "raw") == {"raw": 0}


@pytest.mark.parametrize("opened", [0, 2])
def test_sizes_that_are_open(opened: int) -> None:
    cases: list[Case] = [
        ("t = Gelu(x) u = Transpose<perm=[0,2,1]>(x) y = MatMul(t, u)", (3, 2, 4), {}),
        ("m = ReduceMean(x, k) d = Sub(x, m) y = Reshape(d, s)", (3, 2, 4),
         {"k": whole(0), "s": whole(0, 8)}),
        ("y = MaxPool<kernel_shape=[2]>(x)", (3, 2, 6), {}),
        ("y = DepthToSpace<blocksize=2>(x)", (3, 4, 1, 2), {}),
        ('y = Resize<mode="nearest">(x, , , s)', (3, 2, 1, 2), {"s": whole(3, 2, 2, 6)}),
    ]  # fmt: skip
    for case in cases:
        model, raw = to_one(case, [opened]), spread_out(case[1], 0) / scales(case[1])
        assert not model.graph.input[0].type.tensor_type.shape.dim[opened].dim_value
        found = energies(model, {"raw": raw}, "raw")["raw"]
        assert found == pytest.approx(by_differences(model, raw), rel=0.02), case


def relative_error(error: np.ndarray, signal: np.ndarray, axes: tuple[int, ...]) -> float:
    return float(np.mean(np.sum(error**2, axes) / np.sum(signal**2, axes)))


@pytest.mark.parametrize("channels", [1, 4])
def test_an_energy_times_a_variance_is_the_error_of_the_outputs(channels: int) -> None:
    """Of several channels each counts the same, however loud it is."""
    rng = np.random.default_rng(2)
    size = [channels] * (channels > 1)
    w = rng.standard_normal((*size, 60, 200)) * 100.0 ** np.arange(channels).reshape(-1, 1, 1)
    w = w.reshape(*size, 60, 200).astype(np.float32)
    x = rng.standard_normal((1, *size, 1, 60)).astype(np.float32)
    model = build("y = MatMul(x, w)", x.shape, {"w": w})
    energy = energies(model, {"x": x}, "x")["x"]
    noise = 0.01 * rng.standard_normal((300, *x.shape)).astype(np.float32)
    clean = x @ w
    axes = tuple(k for k in range(clean.ndim) if k != 1) if channels > 1 else (0, 1, 2)
    errors = [relative_error(e @ w, clean, axes) for e in noise]
    assert np.mean(errors) / 2 < energy * 0.01**2 < np.mean(errors) * 2


@pytest.mark.parametrize("behind", ["", "u = Transpose<perm=[0,1,3,2]>(y) z = Identity(u)"])
@pytest.mark.parametrize("faint", [1e-4, 3e-3, 1.0])
def test_a_faint_channel_of_an_output_is_lost_once(faint: float, behind: str) -> None:
    """What is 0 stays 0, and no value changes by more than itself."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1, 4, 60, 60)).astype(np.float32)
    x[0, 3] -= 2.5
    x[0, 3] *= np.float32(faint)
    y = np.maximum(x, 0)
    end = "z" if behind else "y"
    net = build(f"y = Relu(x) {behind}", x.shape, {}, out=f"float[] {end}")
    energy = energies(net, {"x": x}, "y")["y"]
    step = np.float32(y.max() / 255)
    rounded = step * np.round(y / step)
    felt = energy * float(np.mean((rounded - y) ** 2))
    assert harm.relative_error(y, rounded) / 2 < felt < harm.relative_error(y, rounded) * 2


def test_outputs_that_are_alike_or_opposite_count_by_themselves() -> None:
    x = np.random.default_rng(0).standard_normal((1, 400)).astype(np.float32)
    alone = energies(build("y = Exp(x)", x.shape, {}), {"x": x}, "x")["x"]
    for op in ("Neg", "Identity"):
        model = build(f"y = Exp(x) z = {op}(y)", x.shape, {}, out="float[] y, float[] z")
        assert energies(model, {"x": x}, "x")["x"] == pytest.approx(alone, rel=0.25)


@pytest.mark.parametrize("bias", [-9.0, 0.5])
def test_a_lone_logit_is_weighed_by_itself(bias: float) -> None:
    """Its probability, close to 0 or not, does not count; see ``harm``."""
    w = np.random.default_rng(0).standard_normal((6, 1)).astype(np.float32)
    x = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32) * np.float32(0.1)
    constants = {"w": w, "b": np.float32(bias)}
    model = build("m = MatMul(x, w) z = Add(m, b) y = Sigmoid(z)", x.shape, constants)
    signal = (np.maximum(np.abs(x @ w + bias), LONE) ** 2).sum()
    found = energies(model, {"x": x}, "x")["x"]
    assert found == pytest.approx(3 * float((w**2).sum()) / signal, rel=1e-4)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("bias", [3.0, 1e3])
@pytest.mark.parametrize("positions", [POSITIONS - 1, 20])
def test_what_positions_have_in_common_is_no_signal(
    positions: int, bias: float, opened: bool
) -> None:
    x = np.random.default_rng(1).standard_normal((1, positions, 6)).astype(np.float32)
    shape = (1, "n", 6) if opened else x.shape
    constants = {"w": (6, 5), "b": np.float32(bias)}
    model = build("t = MatMul(x, w) y = Add(t, b)", shape, constants, out="float[1,n,5] y")
    (y,) = (found["y"] for found in run(model, [{"x": x}]))
    energy, varied = np.square(y).sum(), np.square(y - y.mean((0, 1))).sum()
    signal = energy if positions < POSITIONS else max(varied, COMMON * energy)
    assert energies(model, {"x": x}, "t")["t"] == pytest.approx(y.size / signal, rel=1e-3)


BRANCHES = """then_branch = taken () => (float[4,6] u) {u = Tanh(t)},
              else_branch = other () => (float[4,6] v) {v = Neg(t)}"""
UNKNOWN = {
    "no rule": "c = ReduceProd(t, first) y = Add(c, k)",
    "no rule for this input": "s = ReduceSum<keepdims=0>(t, first) y = LayerNormalization(k, s)",
    "nor for this one": "s = ReduceSum<keepdims=0>(t, first) y = PRelu(k, s)",
    "an attribute": 's = ScatterElements<reduction="mul">(t, places, ones) y = Add(s, k)',
    "axes that are broadcast": "u = Unsqueeze(t, first)"
    ' e = Einsum<equation="...c,...c->...c">(row, u) y = Neg(e)',
    "an axis that is broadcast": 'e = Einsum<equation="rc,c->r">(t, many) y = Neg(e)',
    "windows beyond the end": "u = Unsqueeze(t, first)"
    " p = AveragePool<kernel_shape=[4],strides=[3],ceil_mode=1,count_include_pad=1>(u)"
    " y = Neg(p)",
    "another kind of cell": "u = Unsqueeze(t, first) y = LSTM<hidden_size=3,clip=2.0>(u, lw, lr)",
    "other activations": "u = Unsqueeze(t, first) y = LSTM<hidden_size=3,"
    'activations=["Tanh","Tanh","Tanh"]>(u, lw, lr)',
    "sequences of several lengths": "u = Unsqueeze(t, first)"
    " y = LSTM<hidden_size=3>(u, lw, lr, , lengths)",
    "a state that is reset before": "u = Unsqueeze(t, first) y = GRU<hidden_size=3>(u, gw, gr)",
    "weights that are computed": "u = Unsqueeze(t, first) m = Relu(lw)"
    " y = LSTM<hidden_size=3>(u, m, lr)",
    "equal axes": 'e = Einsum<equation="rc,rd,ss->cd">(t, x, square) y = Neg(e)',
    "a letter that is summed alone": 'e = Einsum<equation="rc,bc->b">(t, x) y = Mul(e, e)',
    "another domain": "y = mine.Relu(t)",
    "a branch": f"y = If(yes) <{BRANCHES}>",
    "float64": "d = Cast<to=11>(t) e = Exp(d) f = Cast<to=1>(e) y = Add(f, k)",
    "statistics": "n, m = LayerNormalization(t, scale) s = Add(n, m) y = Add(s, k)",
    **{
        f"{mode} samples": f"u = Unsqueeze(t, both) y = GridSample<{attribute}>(u, grid)"
        for mode, attribute in (
            ("cubic", 'mode="cubic"'),
            ("nearest", 'mode="nearest"'),
            ("reflected", 'padding_mode="reflection"'),
        )
    },
    "samples of a volume": "u = Unsqueeze(t, three) y = GridSample(u, places_in_space)",
    "blocks of computed size": "u = Unsqueeze(t, first) n = Neg(minus) y = Col2Im(u, image, n)",
    "capped scores": "u = Unsqueeze(t, both) y = Attention<softcap=2.0>(u, u, u)",
    "scores that are read": "u = Unsqueeze(t, both) a, , , s = Attention(u, u, u) y = MatMul(s, a)",
    "a product with a vector": "s = ReduceSum<keepdims=0>(t, axes) y = MatMul(s, block)",
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_a_way_to_the_outputs_leaves_unknown_is_not_told(kind: str) -> None:
    """Beside it t has a way that is known; so have k, which is told, and x, which is before t."""
    text = f"k = Relu(x) t = Sigmoid(x) {UNKNOWN[kind]} e = Exp(t) z = Add(e, k)"
    constants = {
        "first": whole(0), "axes": whole(1), "places": whole(0).reshape(1, 1),
        "many": (1,), "lw": (1, 12, 6), "lr": (1, 12, 3), "gw": (1, 9, 6), "gr": (1, 9, 3),
        "lengths": np.ones(6, np.int32),
        "ones": (1, 1), "row": (1, 6), "square": (3, 3), "yes": np.bool_(True), "scale": (6,),
        "block": (2, 4, 3), "both": whole(0, 1), "three": whole(0, 1, 2), "grid": GRID,
        "places_in_space": (1, 1, 2, 2, 3), "image": whole(3, 4), "minus": whole(-2, -2),
    }  # fmt: skip
    model = build(text, FLAT, constants, out="float[] y, float[4,6] z")
    found = adjoint(model, ["x", "t", "k", "z"])
    assert found is not None
    assert found.names == ("k", "z")


def test_nothing_can_be_told() -> None:
    text, whole_output = "y = ArgMax(x)", "int64[] y"
    assert adjoint(build(text, FLAT, {}, out=whole_output), ["x"]) is None
    assert adjoint(build("y = Relu(x)", FLAT, {}, opset=13), ["x"]) is None
    assert adjoint(build("y = Relu(x)", FLAT, {}, opset=18), ["x"]) is not None
    assert adjoint(build("t = ReduceProd(x, k) y = Relu(t)", FLAT, {"k": whole(0)}), ["x"]) is None
    assert adjoint(build("y = Relu(x)", FLAT, {}), []) is None


def test_a_logarithm_blows_up_what_is_near_zero() -> None:
    x = np.linspace(1, 2, 24, dtype=np.float32).reshape(FLAT)
    x[1, 2] = 1e-3
    log, relu = (
        energies(build(f"y = {op}(x)", FLAT, {}), {"x": x}, "x")["x"] for op in ("Log", "Relu")
    )
    assert log > 1e3 * relu > 0


TENSORS = ("a", "b")


def graded(numbers: dict[int, float]) -> FewSamples:
    """Energies follow from the digest, as those of one sample do."""
    rows = {f"{k:02x}": values(k, v) for k, v in numbers.items()}
    return FewSamples(names=TENSORS, rows=rows)


PARTS = st.sets(st.integers(0, 12)).map(lambda s: graded({k: k / 7 for k in s}))


@given(PARTS, PARTS, PARTS)
def test_merging_is_associative_and_commutative(
    a: FewSamples, b: FewSamples, c: FewSamples
) -> None:
    assert a.merge(b) == b.merge(a)
    merged = a.merge(b).merge(c)
    assert merged == a.merge(b.merge(c))
    everyone = sorted({*a.rows, *b.rows, *c.rows})
    assert list(merged.rows) == everyone[:SAMPLES]
    assert all(e[0] == int(d, 16) for d, e in merged.rows.items())


@given(PARTS)
def test_what_was_packed_is_the_same_unpacked(part: FewSamples) -> None:
    header, numbers = part.packed()
    assert numbers.shape == (len(part.rows), len(TENSORS))
    assert FewSamples.unpacked(json.loads(json.dumps(header)), numbers) == part


def test_gradients_of_other_tensors_have_nothing_in_common() -> None:
    one = graded({1: 2.0, 5: 3.0})
    other = FewSamples(names=("b", "a"), rows=one.rows)
    assert one != other
    assert one != graded({1: 2.0, 5: 4.0})
    assert one.merge(other) == FewSamples()
    assert one.merge(FewSamples()) == FewSamples() == FewSamples().merge(one)


def spectrogram() -> onnx.ModelProto:
    """Sound → the logarithm of its power in bands, whose quiet parts int8 would drown → a net."""
    k = np.arange(64)
    angles = 2 * np.pi * np.outer(np.arange(1, 33), k) / 64
    waves = np.concatenate([np.cos(angles), np.sin(angles)]) * np.hanning(64)
    bands = np.abs(np.arange(64)[:, None] % 32 - 2 * np.arange(16)) < 2
    text = """wave = Conv<strides=[16]>(x, w) power = Mul(wave, wave)
              turned = Transpose<perm=[0,2,1]>(power) mel = MatMul(turned, bands)
              kept = Clip(mel, least) loud = Log(kept) rows = Transpose<perm=[0,2,1]>(loud)
              a = Conv<pads=[1,1]>(rows, w1) b = Relu(a) y = Conv<pads=[1,1]>(b, w2)"""
    more = {
        "w": waves[:, None].astype(np.float32),
        "bands": bands.astype(np.float32),
        "least": np.float32(1e-6),
        "w1": (64, 16, 3),
        "w2": (64, 64, 3),
    }
    return build(text, (1, 1, 4096), more, out="float[1,64,n] y")


def sounds(seed: int, count: int) -> list[dict[str, np.ndarray]]:
    """Noise, ever quieter at high frequencies."""
    rng = np.random.default_rng(seed)
    spectrum = rng.standard_normal((count, 2049)) + 1j * rng.standard_normal((count, 2049))
    shaped = np.fft.irfft(spectrum / (1 + np.arange(2049) / 40) ** 1.5)
    return [{"x": s[None, None].astype(np.float32)} for s in shaped / np.abs(shaped).max()]


def test_a_spectrogram_stays_good() -> None:
    model, data, held_out = spectrogram(), sounds(0, 8), sounds(1, 4)
    made = qdq.quantize(model, data)
    assert "QuantizeLinear" in {n.op_type for n in made.graph.node}
    wanted = np.stack([o["y"] for o in run(model, held_out)])
    for optimize in (True, False):
        found = np.stack([o["y"] for o in run(made, held_out, optimize=optimize)])
        sqnr = 10 * np.log10(np.sum(wanted**2) / np.sum((found - wanted) ** 2))
        assert sqnr > 25, optimize
    statistics = collect_statistics(model, data)
    assert len(statistics.gradients.rows) == SAMPLES
    later = qdq.quantize(model, statistics=statistics)
    assert later.SerializeToString(deterministic=True) == made.SerializeToString(deterministic=True)


def test_a_model_too_large_has_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = spectrogram(), sounds(0, 2)
    assert collect_statistics(model, data).gradients.names
    monkeypatch.setattr(gains, "_MOST_BYTES", 1000)
    assert collect_statistics(model, data).gradients == FewSamples()


def test_large_matrices_are_not_copied_and_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.4 MB of weights, 20 kB of activations."""
    constants = {"w": weights(600, 600)}
    nodes = [node("MatMul", ["x", "w"], "m"), node("Relu", ["m"], "y")]
    model = build_model(nodes, {"x": [4, 600]}, {"y": [4, 600]}, constants)
    data = feeds({"x": (4, 600)}, 3)
    monkeypatch.setattr(gains, "_MOST_BYTES", 100_000)
    assert collect_statistics(model, data).gradients.names
