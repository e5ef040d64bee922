"""Train the classifier of ``qdq demo`` and write digits.onnx and digits.npz beside this file.

Run it only to make the two files again; the demo needs neither torch nor scikit-learn::

    pip install torch==2.13.0 scikit-learn==1.9.1 onnx
    python qdq/demo/train_digits.py

The data are the 1797 handwritten digits of 8 x 8 pixels, grey values 0..16, that scikit-learn
carries: the test part of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits",
UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49 (CC BY 4.0).
They are shuffled once and split into 1197 for training, 100 for calibration and 500 for the test;
the last two are never trained on. The run is deterministic: same versions and same processor,
same files.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import sklearn.datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]
import torch  # type: ignore[import-not-found, unused-ignore]
from onnx import TensorProto, helper, numpy_helper

FOLDER = Path(__file__).parent
CHANNELS = ((1, 16), (16, 32), (32, 32), (32, 32))  # of the 3x3 convolutions
POOL_AFTER = (1, 2, 3)  # a 2x2 max pooling follows these convolutions
UPSAMPLE = 6  # nearest neighbour, 8x8 to 48x48
EPOCHS = 60
SEED = 20


def split() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images (1797, 8, 8) uint8 and labels (1797,) uint8, shuffled: train, calibration, test."""
    digits = sklearn.datasets.load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.target))
    return digits.images[order].astype(np.uint8), digits.target[order].astype(np.uint8)


def network() -> Any:
    """The network as a torch.nn.Sequential."""
    nn = torch.nn
    layers = [nn.Upsample(scale_factor=UPSAMPLE, mode="nearest")]
    for i, (c_in, c_out) in enumerate(CHANNELS):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out)]
        layers += [nn.ReLU()]
        if i in POOL_AFTER:
            layers += [nn.MaxPool2d(2)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1][1], 10)]
    return nn.Sequential(*layers)


def train(net: Any, images: Any, labels: Any) -> None:
    """Adam with a one-cycle rate; images are shifted by up to one pixel and dimmed."""
    rng = np.random.default_rng(SEED)
    batch = 64
    steps = -(-len(images) // batch)
    adam = torch.optim.Adam(net.parameters(), lr=3e-3, weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, 6e-3, total_steps=EPOCHS * steps)
    for epoch in range(EPOCHS):
        net.train()
        total = 0.0
        for rows in np.array_split(rng.permutation(len(images)), steps):
            x = torch.roll(images[rows], tuple(rng.integers(-1, 2, 2)), (2, 3))
            x = x * float(rng.uniform(0.8, 1.0))
            loss = torch.nn.functional.cross_entropy(net(x), labels[rows], label_smoothing=0.05)
            adam.zero_grad()
            loss.backward()
            adam.step()
            rate.step()
            total += loss.item()
        print(f"epoch {epoch + 1:3d}  loss {total / steps:.4f}", flush=True)
    net.eval()


def export(net: Any) -> onnx.ModelProto:
    """The trained network as ONNX, batch normalization unfolded, input (N, 1, 8, 8) in 0..1."""
    nodes, constants = layers({k: v.numpy() for k, v in net.state_dict().items()})
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("digit", TensorProto.FLOAT, ["N", 10])],
        constants,
    )
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="digits")
    onnx.checker.check_model(model, full_check=True)
    return model


def layers(state: dict[str, Any]) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and constants of a network with this state."""
    constants = [
        numpy_helper.from_array(np.array([1, 1, UPSAMPLE, UPSAMPLE], np.float32), "upsample.scales")
    ]
    nodes = [
        helper.make_node(
            "Resize",
            ["image", "", "upsample.scales"],
            ["upsample"],
            "Resize",
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
    ]

    def constant(name: str, key: str) -> str:
        constants.append(numpy_helper.from_array(state[key], name))
        return name

    def then(op: str, name: str, *more: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(op, [nodes[-1].output[0], *more], [name], name, **attributes))

    layer = 1  # index in the Sequential
    for i in range(len(CHANNELS)):
        weight = constant(f"conv{i}.weight", f"{layer}.weight")
        then("Conv", f"conv{i}", weight, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        parts = ("weight", "bias", "running_mean", "running_var")
        norm = [constant(f"norm{i}.{p}", f"{layer + 1}.{p}") for p in parts]
        then("BatchNormalization", f"norm{i}", *norm)
        then("Relu", f"relu{i}")
        layer += 3
        if i in POOL_AFTER:
            then("MaxPool", f"pool{i}", kernel_shape=[2, 2], strides=[2, 2])
            layer += 1
    then("GlobalAveragePool", "average")
    then("Flatten", "flat")
    parameters = [constant(f"digit.{p}", f"{layer + 2}.{p}") for p in ("weight", "bias")]
    then("Gemm", "digit", *parameters, transB=1)
    return nodes, constants


def main() -> None:
    """Train, report the accuracy, write both files."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    images, labels = split()
    x = torch.from_numpy(images[:, None].astype(np.float32) / 16)
    y = torch.from_numpy(labels.astype(np.int64))
    net = network()
    train(net, x[:1197], y[:1197])
    with torch.no_grad():
        hit = (net(x).argmax(1) == y).numpy()
    print(f"train {hit[:1197].mean():.4f}  calib {hit[1197:1297].mean():.4f}  ", end="")
    print(f"test {hit[1297:].mean():.4f}")
    onnx.save(export(net), FOLDER / "digits.onnx")
    np.savez_compressed(
        FOLDER / "digits.npz",
        calib_images=images[1197:1297],
        test_images=images[1297:],
        test_labels=labels[1297:],
    )


if __name__ == "__main__":
    main()
