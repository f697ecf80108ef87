"""The CUDA worker on the card that is here: checks against the CPU reference, then rates, as one Markdown table.

Usage: python benchmarks/gpu.py [--device cuda|torch-cpu] [--small] [--out FILE] [--seconds N]

Files are built in a temporary folder, nothing is downloaded. First every weight type's products are compared with
dequantized weights in float64, on asymmetric random data, and 4 layers with Mixtral's d_model and an eighth of its
d_ff with the NumPy reference; what differs by more than the tolerance ends the run with exit code 1. Then come, on 4
layers of Mixtral at full width,

- GB/s of quantized weights in the products of decoding, beside the card's own copy rate,
- tokens/s of the slice with all experts in VRAM, with a quarter of them in VRAM and the rest in memory (hybrid and
  not), and streamed from the disk through few slots,
- tokens/s of a prompt of 512 tokens.

`--device torch-cpu --small` runs all of it on torch's `cpu` device in about a minute: its figures say nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import gguf
import numpy as np
import torch
import trio

import mer
from mer.compute.cuda.device import TORCH_CPU, Device
from mer.compute.cuda.opening import choose_kernels
from mer.compute.cuda.products import DeviceExpert, TorchKernels, Work
from mer.compute.cuda.weights import DeviceMatrix
from mer.compute.reference.model import ReferenceModel
from mer.io.ggml import GGMLType

TYPES = [GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.MXFP4, GGMLType.F16, GGMLType.BF16]
HALVES = {GGMLType.Q4_0: (0,), GGMLType.Q8_0: (0,), GGMLType.Q4_K: (0, 2), GGMLType.Q6_K: (208,)}
TOLERANCE = 2e-5  # of float32 sums, relative to the largest result
GEMM_TOLERANCE = 2e-2  # of products in bfloat16
PROMPT, GENERATED = 512, 64


@attrs.frozen
class Sizes:
    """How large everything is."""

    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    vocab: int
    rows: int  # of the matrices that rates are taken of
    weights_bytes: int  # that a rate goes over, so that no cache holds them
    prompt: int
    generated: int


FULL = Sizes(4096, 14336, 32, 8, 4, 32000, 14336, 2 << 30, PROMPT, GENERATED)
SMALL = Sizes(256, 512, 8, 2, 4, 600, 256, 1 << 20, 32, 4)


def random_bytes(kind: GGMLType, rows: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    """Return the bytes [rows, row bytes] of a random matrix whose numbers are small and not symmetric about zero."""
    if kind.block_size == 1:
        values = rng.normal(0.002, 0.02, (rows, cols)).astype(np.float32)
        return np.ascontiguousarray(gguf.quants.quantize(values, _gguf(kind))).view(np.uint8).reshape(rows, -1)
    raw = rng.integers(0, 256, (rows, cols // kind.block_size, kind.block_bytes), np.uint8)
    for first in HALVES.get(kind, ()):
        scales = rng.uniform(1e-4, 3e-4, (*raw.shape[:2], 1)).astype(np.float16)
        raw[:, :, first : first + 2] = scales.view(np.uint8)
    if kind is GGMLType.MXFP4:
        raw[:, :, 0] = rng.integers(116, 120, raw.shape[:2])
    return raw.reshape(rows, -1)


def _gguf(kind: GGMLType) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(int(kind))


def matrix_of(kind: GGMLType, rows: int, cols: int, device: Device, rng: np.random.Generator) -> DeviceMatrix:
    """Return a random matrix on the device."""
    raw = torch.from_numpy(random_bytes(kind, rows, cols, rng).reshape(-1)).to(device.torch)
    return DeviceMatrix.of(kind, rows, cols, raw)


def exact(matrix: DeviceMatrix) -> np.ndarray:
    """Return a matrix in float64, by the `gguf` package."""
    weights = gguf.quants.dequantize(matrix.raw.cpu().numpy(), _gguf(matrix.type))
    return np.asarray(weights, np.float64).reshape(matrix.rows, matrix.cols)


def difference(got: torch.Tensor, want: np.ndarray) -> float:
    """Return the largest difference relative to the largest number."""
    return float(np.abs(got.double().cpu().numpy() - want).max() / np.abs(want).max())


def check_kernels(device: Device, kernels: TorchKernels, report: Report) -> None:
    """Compare every type's products, fused and by dequantizing, and a feed-forward network of it."""
    rng = np.random.default_rng(1)
    for kind in TYPES:
        matrix = matrix_of(kind, 333, 1024, device, rng)
        weights = exact(matrix)
        for n in (1, 3, 64):
            x = rng.normal(0.2, 1, (n, 1024)).astype(np.float32)
            fused = n <= 8 and kernels.form == "triton"
            limit = TOLERANCE if fused or device.gemm_type is torch.float32 else GEMM_TOLERANCE
            got = kernels.matmul(matrix, torch.from_numpy(x).to(device.torch))
            report.check(f"{kind.name} product, {n} rows", difference(got, x @ weights.T), limit)
        parts = [matrix_of(kind, *shape, device, rng) for shape in ((512, 256), (512, 256), (256, 512))]
        gate, up, down = map(exact, parts)
        for n in (2, 40):
            x = rng.normal(0.2, 1, (n, 256)).astype(np.float32)
            h, y = torch.from_numpy(x).to(device.torch), torch.zeros((n, 256), device=device.torch)
            rows = torch.arange(n, device=device.torch)
            kernels.experts([Work(DeviceExpert(*parts), np.stack([np.arange(n)] * 2), rows, rows)], h, y)
            g = x @ gate.T
            want = (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T
            fused = n <= 8 and kernels.form == "triton"
            limit = TOLERANCE if fused or device.gemm_type is torch.float32 else GEMM_TOLERANCE
            report.check(f"{kind.name} expert, {n} rows", difference(y, want), limit)


def write_slice(path: Path, sizes: Sizes, kind: GGMLType) -> None:
    """Write a Mixtral of random weights, experts of one type and the rest Q8_0, tensor by tensor."""
    rng = np.random.default_rng(2)
    d, f, head = sizes.d_model, sizes.d_ff, sizes.d_model // sizes.n_heads
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": sizes.n_layers, "context_length": 4096, "embedding_length": d, "feed_forward_length": f,
        "attention.head_count": sizes.n_heads, "attention.head_count_kv": sizes.n_kv_heads, "expert_count": 8,
        "expert_used_count": 2, "vocab_size": sizes.vocab, "rope.dimension_count": head,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 1e6)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [chr(0x4E00 + i) for i in range(sizes.vocab - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, of: GGMLType, *shape: int) -> None:
        if len(shape) == 1:
            writer.add_tensor(name, (1 + 0.1 * rng.normal(size=shape)).astype(np.float32))
            return
        rows = int(np.prod(shape[:-1]))
        raw = random_bytes(of, rows, shape[-1], rng)
        writer.add_tensor(name, raw.reshape(*shape[:-1], -1), raw_dtype=_gguf(of))

    add("token_embd.weight", GGMLType.Q8_0, sizes.vocab, d)
    for layer in range(sizes.n_layers):
        block = f"blk.{layer}."
        add(block + "attn_norm.weight", GGMLType.F32, d)
        add(block + "attn_q.weight", GGMLType.Q8_0, d, d)
        add(block + "attn_k.weight", GGMLType.Q8_0, sizes.n_kv_heads * head, d)
        add(block + "attn_v.weight", GGMLType.Q8_0, sizes.n_kv_heads * head, d)
        add(block + "attn_output.weight", GGMLType.Q8_0, d, d)
        add(block + "ffn_norm.weight", GGMLType.F32, d)
        router = rng.normal(0.01, 1 / np.sqrt(d), (8, d)).astype(np.float32)
        writer.add_tensor(block + "ffn_gate_inp.weight", router)
        add(block + "ffn_gate_exps.weight", kind, 8, f, d)
        add(block + "ffn_up_exps.weight", kind, 8, f, d)
        add(block + "ffn_down_exps.weight", kind, 8, d, f)
    add("output_norm.weight", GGMLType.F32, d)
    add("output.weight", GGMLType.Q8_0, sizes.vocab, d)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


async def check_slice(path: Path, device: Device, report: Report) -> None:
    """Compare the slice's tokens with the reference's logits, by teacher forcing."""
    prompt = [int(token) for token in np.random.default_rng(3).integers(3, 259, 12)]
    async with mer.open_engine(path, device=device.name, hybrid="off", context=512) as engine:
        tokens = (await engine.generate(prompt, max_tokens=6, ignore_eos=True)).tokens
    logits = ReferenceModel(path).logits([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
    logits[:, 2] = -np.inf
    spread = logits.max(1) - np.median(logits, 1)
    loss = (logits.max(1) - logits[np.arange(len(tokens)), list(tokens)]) / spread
    report.check("Mixtral slice: logit lost by the chosen tokens", float(loss.max()), 5e-2)


def seconds_of(device: Device, work: Callable[[], object], seconds: float) -> float:
    """Return the shortest time of a call, of as many as fit the given time, and 3 at least."""
    best, begun, calls = float("inf"), time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        work()
        device.mark().block()
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return best


def copy_rate(device: Device, n_bytes: int, seconds: float) -> float:
    """Return the bytes per second that a copy within the device's memory reads and writes."""
    source = device.zeros(n_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * n_bytes / seconds_of(device, lambda: target.copy_(source), seconds)


def rate_kernels(device: Device, kernels: TorchKernels, sizes: Sizes, seconds: float, report: Report) -> None:
    """Measure GB/s of weights for one row, beside what a copy within the device's memory moves."""
    rng = np.random.default_rng(4)
    copied = copy_rate(device, sizes.weights_bytes, seconds) / 1e9
    report.row("copy within the device (read and written)", f"{copied:.1f} GB/s", "")
    for kind in TYPES:
        first = matrix_of(kind, sizes.rows, sizes.d_model, device, rng)
        n = max(1, sizes.weights_bytes // first.raw.numel())
        matrices = [DeviceMatrix(kind, first.rows, first.cols, first.raw.clone()) for _ in range(n)]
        x = torch.ones((1, sizes.d_model), device=device.torch)

        def multiply(matrices: list[DeviceMatrix] = matrices, x: torch.Tensor = x) -> None:
            for matrix in matrices:
                kernels.matmul(matrix, x)

        multiply()
        rate = n * first.raw.numel() / seconds_of(device, multiply, seconds) / 1e9
        report.row(f"{kind.name} product, 1 row", f"{rate:.1f} GB/s", f"{rate / copied:.0%} of the copy rate")


async def rate_slice(path: Path, device: Device, sizes: Sizes, report: Report) -> None:
    """Measure tokens/s of decoding and of a prompt, with experts in VRAM, in memory and on the disk."""
    total = sizes.n_layers * 8
    cases: list[tuple[str, dict[str, Any]]] = [
        ("all experts in VRAM", {"hybrid": "off"}),
        ("a quarter in VRAM, the rest in memory", {"hybrid": "off", "vram_slots": total // 4}),
        ("a quarter in VRAM, the rest in memory, hybrid", {"hybrid": "auto", "vram_slots": total // 4}),
        ("a quarter in VRAM, 3 slots in memory, streamed", {"hybrid": "off", "vram_slots": total // 4, "slots": 3}),
    ]
    rng = np.random.default_rng(5)
    for name, options in cases:
        async with mer.open_engine(
            path, device=device.name, context=1024, max_sequences=1, batch_tokens=512, prefix_reuse=False, **options
        ) as engine:
            warm = [int(token) for token in rng.integers(3, 259, sizes.prompt)]
            await engine.generate(warm, max_tokens=sizes.generated, ignore_eos=True)
            prompt = [int(token) for token in rng.integers(3, 259, sizes.prompt)]
            done = await engine.generate(prompt, max_tokens=sizes.generated, ignore_eos=True)
            vram = engine.statistics().worker.vram
            assert vram is not None
            decode = (len(done.tokens) - 1) / done.timings.decode_s
            prefill = sizes.prompt / done.timings.prefill_s
            what = f"{vram.hits} hits, {vram.uploads} copied, {vram.cpu_runs} on the processor, {vram.graphs} graphs"
            report.row(f"{name}: decoding", f"{decode:.1f} tokens/s", what)
            report.row(f"{name}: prompt of {sizes.prompt}", f"{prefill:.0f} tokens/s", "")


@attrs.define
class Report:
    """A table, and what did not pass."""

    title: str
    lines: list[str] = attrs.Factory(list)
    failures: list[str] = attrs.Factory(list)

    def row(self, what: str, figure: str, remark: str) -> None:
        """Add a line, and print it at once."""
        self.lines.append(f"| {what} | {figure} | {remark} |")
        print(self.lines[-1], flush=True)

    def check(self, what: str, error: float, limit: float) -> None:
        """Add a comparison."""
        passed = error <= limit  # false for NaN
        if not passed:
            self.failures.append(what)
        self.row(what, f"{error:.1e}", f"{'within' if passed else 'ABOVE'} {limit:.0e}")

    def text(self) -> str:
        """Return the page."""
        head = [f"# {self.title}", "", "| what | figure | |", "| --- | --- | --- |"]
        return "\n".join([*head, *self.lines, ""])


def main() -> int:
    """Check, measure, and write the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or torch-cpu")
    parser.add_argument("--small", action="store_true", help="sizes that a processor goes through in a minute")
    parser.add_argument("--type", default="Q4_0", choices=[kind.name for kind in TYPES], help="of the slice's experts")
    parser.add_argument("--seconds", type=float, default=1.0, help="that each rate is measured for")
    parser.add_argument("--out", type=Path, help="file for the table; by default docs/benchmarks/gpu-CARD.md")
    options = parser.parse_args()
    name = options.device if options.device == TORCH_CPU or ":" in options.device else f"{options.device}:0"
    device, sizes = Device(name), SMALL if options.small else FULL
    kernels = choose_kernels(device)
    versions = f"torch {torch.__version__}, kernels: {kernels.form}"
    report = Report(f"{device.label}{' (small sizes)' if options.small else ''}")
    report.row("in force", versions, f"products of many rows in {str(device.gemm_type).removeprefix('torch.')}")
    with tempfile.TemporaryDirectory() as folder:
        with device.computing():
            check_kernels(device, kernels, report)
            rate_kernels(device, kernels, sizes, options.seconds, report)
        narrow = Path(folder) / "narrow.gguf"  # NumPy takes float64 of it: 6 GB of the narrow one, 45 of the whole
        write_slice(narrow, attrs.evolve(sizes, d_ff=max(256, sizes.d_ff // 8), vocab=600), GGMLType[options.type])
        trio.run(check_slice, narrow, device, report)
        path = Path(folder) / "slice.gguf"
        write_slice(path, sizes, GGMLType[options.type])
        trio.run(rate_slice, path, device, sizes, report)
    out = options.out
    if out is None:
        card = device.label.partition("(")[2].rstrip(")").replace(" ", "-") or device.name
        out = Path(__file__).parent.parent / "docs" / "benchmarks" / f"gpu-{card}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report.text(), encoding="utf-8")
    print(f"written to {out}", file=sys.stderr)
    for failure in report.failures:
        print(f"NOT PASSED: {failure}", file=sys.stderr)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
