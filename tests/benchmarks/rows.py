"""What is measured: each row is one kernel at one size, in float and in int8."""

import numpy as np
from micro import chain, profile


def conv_row(cin, cout, k, size, group=1, width=None):
    """A chain of cin -> cout -> cin; one row is the sum of the two."""
    width = width or size
    kh, kw = (k, k) if isinstance(k, int) else k

    def unit(net, x):
        x = net.conv(x, cin, cout, k, group=group)
        return x if cin == cout else net.conv(x, cout, cin, k, group=group)

    f, q, ops = chain(unit, (1, cin, size, width))
    pairs = [(cin, cout)] + ([(cout, cin)] if cin != cout else [])
    parts = [
        {
            "cin": a,
            "cout": b,
            "taps": kh * kw,
            "group": group,
            "in": a * size * width,
            "out": b * size * width,
            "macs": a * b // group * kh * kw * size * width,
        }
        for a, b in pairs
    ]
    kind = "dense" if group == 1 else "depthwise" if group == cin else "grouped"
    kind = "pointwise" if kind == "dense" and kh * kw == 1 else kind
    return {"kind": f"Conv.{kind}", "parts": parts, "float": f, "int8": q, "ops": ops}


def small_conv_rows():
    """From 14 thousand to 2 million multiply-accumulates, and first convolutions."""
    for c, k, s, g in [
        (8, 3, 10, 1),
        (16, 3, 10, 1),
        (32, 3, 5, 1),
        (32, 3, 10, 1),
        (64, 3, 7, 1),
        (16, 3, 5, 1),
        (16, 3, 10, 16),
        (16, 3, 20, 16),
        (64, 3, 5, 64),
        (120, 5, 6, 120),
        (112, 3, 10, 112),
        (208, 3, 14, 208),
        (240, 3, 7, 240),
        (576, 5, 7, 576),
        (16, 1, 10, 1),
        (16, 1, 20, 1),
        (24, 1, 10, 1),
        (64, 1, 5, 1),
        (96, 1, 6, 1),
    ]:
        yield conv_row(c, c, k, s, group=g)
    for cin, cout, size in [(3, 32, 224), (3, 16, 320), (1, 16, 40), (3, 8, 96)]:
        row = {"kind": "Conv.narrow"}
        for key, int8 in (("float", False), ("int8", True)):
            nodes = profile(
                lambda net, i=cin, o=cout, s=size: [
                    net.conv(net.input(1, i, s, s), i, o, 3, stride=2)
                ],
                int8,
            )
            row[key] = sum(t for op, _, t in nodes if op in ("Conv", "QLinearConv"))
        out = cout * (size // 2) ** 2
        row["parts"] = [
            {"cin": cin, "cout": cout, "taps": 9, "group": 1, "in": cin * size**2, "out": out}
        ]
        yield row


def conv_rows():
    """From 0.1 to 240 million multiply-accumulates."""
    for c, s in [
        (8, 80),
        (16, 80),
        (16, 160),
        (24, 56),
        (32, 56),
        (32, 112),
        (48, 28),
        (64, 28),
        (64, 56),
        (64, 80),
        (96, 14),
        (128, 14),
        (128, 40),
        (192, 20),
        (256, 7),
        (256, 20),
        (512, 7),
    ]:
        yield conv_row(c, c, 3, s)
    for c, s in [(16, 40), (32, 28), (64, 14), (20, 28), (36, 28), (30, 28)]:
        yield conv_row(c, c, 5, s)
    for c, d, s in [
        (8, 32, 80),
        (16, 64, 80),
        (16, 96, 112),
        (24, 144, 56),
        (32, 32, 56),
        (40, 240, 28),
        (64, 64, 80),
        (80, 480, 14),
        (112, 672, 14),
        (128, 128, 40),
        (128, 128, 7),
        (192, 1152, 7),
        (256, 256, 20),
        (320, 1280, 7),
        (512, 512, 7),
        (64, 64, 1),
        (64, 256, 1),
        (256, 1024, 1),
        (20, 60, 28),
        (30, 90, 28),
        (16, 16, 20),
        (32, 8, 1),
        (384, 64, 20),
    ]:
        yield conv_row(c, d, 1, s)
    for c, s in [
        (16, 80),
        (32, 112),
        (64, 56),
        (96, 56),
        (144, 28),
        (240, 28),
        (480, 14),
        (672, 14),
        (1152, 7),
        (200, 14),
        (36, 28),
        (512, 20),
        (64, 7),
    ]:
        yield conv_row(c, c, 3, s, group=c)
    for c, s in [(32, 56), (144, 28), (240, 28), (672, 14), (1152, 7), (120, 12)]:
        yield conv_row(c, c, 5, s, group=c)
    for c, d, n in [(32, 32, 256), (128, 16, 128), (16, 16, 64), (64, 64, 64)]:
        yield conv_row(c, d, (64, 1), n, width=1)
    for c, n in [(64, 200), (256, 100)]:
        yield conv_row(c, c, (1, 3), 1, width=n)


def matmul_rows():
    for m in (1, 16, 64, 128, 512):
        for k, n in [(64, 64), (128, 512), (384, 384), (384, 1536), (768, 1536)]:
            if m == 512 and k == 768:
                continue
            for op in ("Gemm", "MatMul"):
                f, q, ops = chain(
                    lambda net, x, k=k, n=n, op=op: net.gemm(net.gemm(x, k, n, op=op), n, k, op=op),
                    (m, k),
                )
                nodes = profile(
                    lambda net, m=m, k=k, n=n, op=op: [
                        net.gemm(net.input(m, k), k, n, op=op, quantize=False)
                    ],
                    True,
                )
                yield {
                    "kind": op,
                    "m": m,
                    "k": k,
                    "n": n,
                    "float": f / 2,
                    "int8": q / 2,
                    "float_out": nodes,
                    "ops": ops,
                }
    for b, m, k, n in [
        (12, 64, 32, 64),
        (12, 64, 64, 32),
        (12, 128, 32, 128),
        (12, 128, 128, 32),
        (8, 256, 64, 256),
        (8, 256, 256, 64),
        (8, 40, 15, 40),
        (1, 128, 384, 128),
        (1, 1024, 64, 1024),
        (1, 1024, 1024, 512),
    ]:
        for kind in ("MatMul.dynamic", "MatMul.signed"):
            row = {"kind": kind, "b": b, "m": m, "k": k, "n": n}
            for key, int8, quantize in [("float", 0, 1), ("int8", 1, 1), ("float_out", 1, 0)]:
                row[key] = profile(
                    lambda net, s=(b, m, k, n), z=quantize, c=kind: [product(net, *s, z, c)],
                    bool(int8),
                )
            yield row


def product(net, b, m, k, n, quantize, kind):
    """Of two activations."""
    right = net.input(b, k, n)
    factors = [net.input(b, m, k), net.signed(right) if kind == "MatMul.signed" else right]
    return net.op("MatMul", factors, quantize=quantize)


def vector(net, *values):
    return net.const(np.array(values, np.int64))


def units():
    """name -> builder(net, x, shape) of one operator without convolution."""

    def other(net, shape):
        return net.other(*shape)

    def channel(net, shape):
        return net.other(*shape[:2], *[1] * (len(shape) - 2))

    return {
        "Add": lambda n, x, s: n.op("Add", [x, other(n, s)]),
        "Mul": lambda n, x, s: n.op("Mul", [x, other(n, s)]),
        "Mul.channel": lambda n, x, s: n.op("Mul", [x, channel(n, s)]),
        "Add.channel": lambda n, x, s: n.op("Add", [x, channel(n, s)]),
        "Mul.scalar": lambda n, x, s: n.op("Mul", [x, n.tensor()]),
        "Add.scalar": lambda n, x, s: n.op("Add", [x, n.tensor()]),
        "Sigmoid": lambda n, x, s: n.op("Sigmoid", [x]),
        "HardSigmoid": lambda n, x, s: n.op("HardSigmoid", [x]),
        "HardSwish": lambda n, x, s: n.op("HardSwish", [x]),
        "Tanh": lambda n, x, s: n.op("Tanh", [x]),
        "Erf": lambda n, x, s: n.op("Erf", [x]),
        "Relu": lambda n, x, s: n.op("Relu", [x]),
        "Clip": lambda n, x, s: n.op("Clip", [x, n.const(np.float32(-1)), n.const(np.float32(1))]),
        "Div": lambda n, x, s: n.op("Div", [x, n.tensor()]),
        "Sub": lambda n, x, s: n.op("Sub", [x, other(n, s)]),
        "LeakyRelu": lambda n, x, s: n.op("LeakyRelu", [x], alpha=0.1),
        "Softmax": lambda n, x, s: n.op("Softmax", [x], axis=-1),
        "Concat": lambda n, x, s: n.op("Concat", [x, other(n, s)], axis=1),
        "AveragePool": lambda n, x, s: n.op(
            "AveragePool", [x], kernel_shape=[2, 2], strides=[2, 2]
        ),
        "MaxPool": lambda n, x, s: n.op("MaxPool", [x], kernel_shape=[2, 2], strides=[2, 2]),
        "MaxPool.5x5": lambda n, x, s: n.op("MaxPool", [x], kernel_shape=[5, 5], pads=[2, 2, 2, 2]),
        "GlobalAveragePool": lambda n, x, s: n.op("GlobalAveragePool", [x]),
        "Resize": lambda n, x, s: n.op(
            "Resize",
            [x, "", n.const(np.array([1, 1, 2, 2], np.float32))],
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        ),
        "Split": lambda n, x, s: n.op(
            "Concat",
            [
                n.qdq(y)
                for y in n.raw("Split", [x, vector(n, s[1] // 2, s[1] - s[1] // 2)], 2, axis=1)
            ][::-1],
            axis=1,
        ),
        "Transpose": lambda n, x, s: n.op(
            "Transpose", [x], perm=[*range(len(s) - 2), len(s) - 1, len(s) - 2]
        ),
        "Reshape": lambda n, x, s: n.op("Reshape", [x, vector(n, s[0], -1)]),
        "Slice": lambda n, x, s: n.op(
            "Slice", [x, vector(n, 0), vector(n, s[1] // 2), vector(n, 1)]
        ),
        "Where": lambda n, x, s: n.op(
            "Where", [n.const(np.arange(s[-1]) % 2 == 0), x, other(n, s)]
        ),
        "ReduceMean": lambda n, x, s: n.op("ReduceMean", [x], axes=[-1], keepdims=1),
        "LayerNormalization": lambda n, x, s: n.op(
            "LayerNormalization", [x, n.const(np.ones(s[-1], np.float32))], axis=-1
        ),
    }


FOUR = {
    "AveragePool",
    "MaxPool",
    "MaxPool.5x5",
    "GlobalAveragePool",
    "Resize",
    "Mul.channel",
    "Add.channel",
}
SHAPES = [(1, 16, 10, 10), (1, 64, 28, 28), (1, 64, 80, 80), (128, 384), (1, 128, 20, 20)]
ALL_FLOAT = {
    "HardSigmoid",
    "HardSwish",
    "Tanh",
    "Erf",
    "Relu",
    "Clip",
    "Div",
    "Sub",
    "ReduceMean",
    "LayerNormalization",
}


def plain_rows():
    """Each operator between Q/DQ, away from convolutions."""
    for name, build in units().items():
        for shape in SHAPES:
            if len(shape) == 2 and name in FOUR:
                continue
            row = {"kind": name, "shape": shape}
            for key, int8 in (("float", False), ("int8", True)):
                if not (int8 and name in ALL_FLOAT):
                    row[key] = profile(
                        lambda net, s=shape, b=build: [b(net, net.input(*s), s)], int8
                    )
            yield row


def beside_rows():
    """Each operator between 1x1 convolutions: blocked layout in float, NHWC in int8."""
    for name, build in units().items():
        if name in ("Softmax", "ReduceMean", "LayerNormalization", "Where", "Reshape", "Erf"):
            continue
        for c, s in [(16, 10), (64, 28), (64, 80), (128, 20)]:
            shape = (1, c, s, s)

            def net_of(net, c=c, shape=shape, build=build, name=name):
                y = build(net, net.conv(net.input(*shape), c, c, 1), shape)
                after = {"Concat": 2 * c, "Slice": c // 2}.get(name, c)
                return [net.conv(y, after, c, 1)]

            row = {"kind": name, "shape": shape}
            for key, int8 in (("float", False), ("int8", True)):
                row[key] = profile(net_of, int8)
            yield row


def border_rows():
    """Q, DQ and layout nodes: around int8 convs, around float convs, and between the two."""
    for c, s in [(3, 224), (16, 10), (16, 80), (64, 14), (64, 56), (64, 80), (256, 20), (512, 7)]:

        def mixed(net, c=c, s=s):
            net.int8 = False
            x = net.conv(net.input(1, c, s, s), c, c, 1)
            net.int8 = True
            x = net.conv(net.qdq(x), c, c, 1)
            net.int8 = False
            return [net.conv(x, c, c, 1)]

        row = {"shape": (1, c, s, s), "mixed": profile(mixed, True)}
        for key, int8 in (("float", False), ("int8", True)):
            row[key] = profile(lambda n, c=c, s=s: [n.conv(n.input(1, c, s, s), c, c, 1)], int8)
        yield row
    for shape in [(1, 64), (1, 1536), (128, 384), (512, 1536), (1, 128, 384), (12, 128, 128)]:
        yield {
            "shape": shape,
            "int8": profile(lambda n, s=shape: [n.qdq(n.input(*s))], True),
            "one": profile(lambda n, s=shape: [n.op("Sigmoid", [n.input(*s)])], True),
        }


def fusion_rows():
    """What follows a convolution: chains of conv + tail, to subtract the plain conv."""
    tails = {
        "none": lambda n, x, y: x,
        "Relu": lambda n, x, y: n.qdq(n.raw("Relu", [x]), n.const(np.uint8(0))),
        "Add": lambda n, x, y: n.op("Add", [x, y]),
        "Silu": lambda n, x, y: n.op("Mul", [x, n.op("Sigmoid", [x])]),
        "HardSwish": lambda n, x, y: n.op("Mul", [x, n.op("HardSigmoid", [x])]),
        "Sigmoid": lambda n, x, y: n.op("Sigmoid", [x]),
    }
    for c, s in [(64, 28), (64, 80), (128, 20)]:
        for name, tail in tails.items():

            def unit(net, x, c=c, name=name, tail=tail):
                return tail(net, net.conv(x, c, c, 1, quantize=name != "Relu"), x)

            head = lambda n, x, c=c: n.conv(x, c, c, 1)  # noqa: E731
            f, q, ops = chain(unit, (1, c, s, s), head=head)
            yield {"kind": name, "shape": (1, c, s, s), "float": f, "int8": q, "ops": ops}


def overhead_rows():
    """Smallest chains: wall clock per node."""
    for shape in [(1, 8), (1, 64, 4, 4), (1, 64, 28, 28), (1, 64, 80, 80), (128, 384)]:
        for name in ("Add", "Mul", "Sigmoid", "LeakyRelu", "Add.scalar"):
            build = units()[name]

            def unit(net, x, shape=shape, build=build):
                return build(net, x, shape)

            f, q, ops = chain(unit, shape)
            yield {"kind": name, "shape": shape, "float": f, "int8": q, "ops": ops}


GROUPS = {
    "small": small_conv_rows,
    "conv": conv_rows,
    "matmul": matmul_rows,
    "plain": plain_rows,
    "beside": beside_rows,
    "border": border_rows,
    "fusion": fusion_rows,
    "overhead": overhead_rows,
}
