"""Generation: the DCGAN-64 generator in eval mode without gradients, at batch 1, 16, 64 and 256.

Beside PyTorch stand two inference runtimes, on the same network exported to ONNX; each is a row where its package is
installed (pip install onnx onnxscript onnxruntime openvino) and a skipped row with the reason elsewhere. Every row's
images are compared with those of plain float32 PyTorch before it is timed. The runtimes pack their weights once, when
they load, and so does fastgan-frozen (`fastgan.freeze`); PyTorch and fastgan take weights as they are at each call.
"""

import copy
import functools
import importlib
import tempfile
from pathlib import Path

import pytest
import torch
from bench_step import forward
from bench_step import layers as layers_of
from torch import nn

import fastgan
from fastgan.benchmarking.comparison import Case, Runner, checked
from fastgan.benchmarking.textbook import compiled
from fastgan.export import export

BATCHES = (1, 16, 64, 256)
LATENT = 100
SECONDS = 6.0  # of rounds, for ten rows
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the images' norm; bf16 rounds each layer to 2^-9
ROWS = (
    "eager",
    "eager-channels_last",
    "eager-channels_last-bf16",
    "compile-channels_last",
    "compile-channels_last-bf16",
    "onnxruntime",
    "openvino",
    "openvino-bf16",
    "fastgan",
    "fastgan-bf16",
    "fastgan-frozen",
    "fastgan-frozen-bf16",
)
CASES = [Case("sample", "dcgan-64", f"batch{n}") for n in BATCHES]


@functools.cache
def generator():
    """The network, its running statistics those of its own activations; the same for every case."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        g, _ = fastgan.models.build("dcgan-64")
        with torch.no_grad():
            for _ in range(30):
                g(torch.randn(32, LATENT))
    return g.eval()


def runners(case):
    torch._dynamo.reset()
    z = torch.randn(int(case.direction.removeprefix("batch")), LATENT)
    nhwc = copy.deepcopy(generator()).to(memory_format=torch.channels_last)
    ours = fastgan.convert(copy.deepcopy(nhwc))
    with torch.no_grad():
        want = generator()(z)

    def row(run, dtype="float32", **facts):
        images = checked(run, {"the images": want}, TOLERANCE[dtype], lambda: {"the images": run()})
        return Runner(images, work(case, dtype), dtype, **facts)

    def torch_row(network, dtype="float32", **facts):
        @torch.no_grad()
        def run():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                return network(z)

        return row(run, dtype, **facts)

    def frozen_row(network, dtype):
        frozen = fastgan.freeze(network, dtype=getattr(torch, dtype))
        return row(lambda: frozen(z), dtype, ours=True)

    return {
        "eager": torch_row(generator()),
        "eager-channels_last": torch_row(nhwc),
        "eager-channels_last-bf16": torch_row(nhwc, "bfloat16"),
        "compile-channels_last": torch_row(compiled(nhwc)),
        "compile-channels_last-bf16": torch_row(compiled(nhwc), "bfloat16"),
        "onnxruntime": row(late(onnxruntime, z), pytorch=False),
        "openvino": row(late(openvino, z, "f32"), pytorch=False),
        "openvino-bf16": row(late(openvino, z, "bf16"), "bfloat16", pytorch=False),
        "fastgan": torch_row(ours, ours=True),
        "fastgan-bf16": torch_row(ours, "bfloat16", ours=True),
        "fastgan-frozen": frozen_row(nhwc, "float32"),
        "fastgan-frozen-bf16": frozen_row(nhwc, "bfloat16"),
    }


def work(case, dtype):
    """cost() of the convolutions; batch norm and activations are in their epilogues and cost nothing."""
    with torch.device("meta"):
        g, _ = fastgan.models.build("dcgan-64")
        g, z = g.to(getattr(torch, dtype)), torch.empty(int(case.direction.removeprefix("batch")), LATENT)
        seen = layers_of(g, z.to(getattr(torch, dtype)))
    return [forward(*layer) for layer in seen if isinstance(layer[0], nn.ConvTranspose2d)]


# ---- runtimes -------------------------------------------------------------------------------------------------------


def late(make, *arguments):
    """make(*arguments) at the first call: a runtime that is absent is then a row that says so."""
    made = []

    def call():
        if not made:
            made.append(make(*arguments))
        return made[0]()

    return call


@functools.cache
def exported():
    """The generator as an ONNX file with a free batch size."""
    path = Path(tempfile.mkdtemp(prefix="fastgan-benchmarks-")) / "generator.onnx"
    export(generator(), path, format="onnx", latent=LATENT)
    return str(path)


def onnxruntime(z):
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its idle threads slow the next row
    batch = importlib.import_module("onnx").load(exported()).graph.input[0].type.tensor_type.shape.dim[0].dim_param
    options.add_free_dimension_override_by_name(batch, len(z))
    session = runtime.InferenceSession(exported(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: z.numpy()}
    return lambda: session.run(None, feed)[0]


def openvino(z, precision):
    runtime = importlib.import_module("openvino")
    core = runtime.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RuntimeError("openvino: the CPU must have bf16 instructions, got none")
    model = core.read_model(exported())
    model.reshape([len(z), LATENT])
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(runtime.Tensor(z.numpy(), shared_memory=True))
    output = request.get_output_tensor()

    def run():
        request.infer()
        return output.data

    return run


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sample(case, row, compare):
    compare(case, row, runners, seconds=SECONDS)
