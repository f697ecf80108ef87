"""`mer inspect`: what a model file holds and whether it can be run, from its header alone."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from mer.compute.cpu.forward import kv_layout
from mer.compute.kernels.kv_layout import KV_TILE
from mer.compute.kernels.target import FORM
from mer.errors import MerError
from mer.io.files import IoMode, ModelFile
from mer.io.gguf import GGUFFile, read_gguf
from mer.json_text import json_text
from mer.model.loading import Model, check_model
from mer.model.summary import summary
from mer.plan.device import choose_device
from mer.plan.memory import default_kv_type
from mer.quoting import one_line
from mer.text.tokenizer import Tokenizer
from mer.units import format_bytes

_SHOWN_ITEMS = 4  # of an array
_SHOWN_ENDS = 12
_SHOWN_CHARS = 200  # of a text


def inspect(path: Path, *, tensors: bool, as_json: bool) -> None:
    """Print what the header of a model file says.

    Raises:
        ModelFileError: the file is malformed. A well-formed file that cannot be run is described, with the reason.
    """
    gguf = read_gguf(path)
    report = describe(gguf)
    if tensors:
        report["tensors"] = [
            {
                "name": t.name,
                "type": t.type.name,
                "shape": list(t.shape),
                "offset": t.offset,
                "bytes": t.n_bytes,
                "file": t.file,
            }
            for t in gguf.tensors.values()
        ]
    if as_json:
        report["metadata"] = {key: _shortened(value) for key, value in gguf.metadata.items()}
        print(json_text(report))
    else:
        _print(gguf, report)


def describe(gguf: GGUFFile) -> dict[str, Any]:
    """Return the facts about a model file as JSON-ready values; sizes in bytes."""
    types: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for tensor in gguf.tensors.values():
        counts[tensor.type.name] += 1
        types[tensor.type.name] += tensor.n_bytes
    report: dict[str, Any] = {
        "files": [str(path) for path in gguf.paths],
        "file_bytes": sum(gguf.file_bytes),
        "gguf_version": gguf.version,
        "architecture": _shortened(gguf.metadata.get("general.architecture")),
        "name": _shortened(gguf.metadata.get("general.name")),
        "license": _shortened(gguf.metadata.get("general.license")),
        "parameters": sum(prod(tensor.shape) for tensor in gguf.tensors.values()),
        "tensor_types": {name: {"tensors": counts[name], "bytes": types[name]} for name in sorted(counts)},
        "tokenizer": _tokenizer(gguf),
        "chat_template": "tokenizer.chat_template" in gguf.metadata,
        "io": [attrs.asdict(mode) for mode in _io_modes(gguf)],
        "kernels": FORM.value,
        "device": _device(),
        "runnable": True,
        "why_not": None,
    }
    try:
        model, tokenizer = _check(gguf)
    except MerError as error:
        report |= {"runnable": False, "why_not": str(error)}
        return report
    spec, experts = model.spec, model.experts
    sizes = [extents.n_bytes for layer in experts.experts for extents in layer]
    report["tokenizer"]["ends"] = sorted(tokenizer.eos_ids)
    report["model"] = summary(spec)
    report["experts"] = None
    if sizes:
        report["experts"] = {
            "naming": "merged" if any(name.endswith("_exps.weight") for name in gguf.tensors) else "one by one",
            "bytes": experts.total_bytes,
            "largest_bytes": max(sizes),
            "bytes_per_token": spec.n_routed * spec.top_k * experts.total_bytes // len(sizes),
        }
    kv_type = default_kv_type(model.dense.values(), experts)
    report["kv_type"] = kv_type
    report["kv_bytes_per_token"] = kv_layout(spec, kv_type).block_bytes // KV_TILE
    report["dense_bytes"] = sum(t.n_bytes for t in model.dense.values())
    return report


def _check(gguf: GGUFFile) -> tuple[Model, Tokenizer]:
    """Return model and tokenizer, with everything proven that an engine needs of the file."""
    return check_model(gguf), Tokenizer.from_gguf(gguf)


def _io_modes(gguf: GGUFFile) -> list[IoMode]:
    """Return how each part of the model would be read here."""
    modes = []
    for path in gguf.paths:
        file = ModelFile(path)
        modes.append(file.mode)
        file.close()
    return modes


def _device() -> dict[str, str]:
    """Return what would compute here if nothing is set, and why."""
    chosen = choose_device("auto")
    return {"name": chosen.name, "label": chosen.label, "reason": chosen.reason}


def _tokenizer(gguf: GGUFFile) -> dict[str, Any]:
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    return {
        "model": _shortened(gguf.metadata.get("tokenizer.ggml.model")),
        "pre": _shortened(gguf.metadata.get("tokenizer.ggml.pre")),
        "tokens": len(tokens) if isinstance(tokens, list) else 0,
    }


def _shortened(value: Any) -> Any:
    """Return a metadata value for printing: long arrays and texts cut, lone surrogates replaced."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return {"count": len(value), "first": [_shortened(item) for item in value[:_SHOWN_ITEMS]]}
    if isinstance(value, str):
        value = value.encode("utf-8", "replace").decode()
        return value if len(value) <= _SHOWN_CHARS else value[:_SHOWN_CHARS] + "\u2026"
    return value


def _print(gguf: GGUFFile, report: dict[str, Any]) -> None:
    """Print the report for a person."""
    n_more = len(gguf.paths) - 1
    rows = [
        ("file", report["files"][0] + (f" and {n_more} more" if n_more else "")),
        ("name", report["name"] or "not stated"),
        ("licence", report["license"] or "not stated"),
        ("architecture", report["architecture"]),
        ("size", f"{format_bytes(report['file_bytes'])}, {report['parameters'] / 1e6:,.1f} M parameters"),
    ]
    if report["runnable"]:
        m, e = report["model"], report["experts"]
        heads = f"{m['n_heads']} heads, {m['n_kv_heads']} KV heads of {m['head_dim']}, RoPE {m['rope_style']}"
        layers, widths = f"{m['n_layers']}, all of them dense", f"d_ff {m['dense_d_ff']}"
        if e is not None:
            layers = f"{m['n_layers']}, {m['n_experts']} experts each, {m['top_k']} per token ({m['routing']})"
            widths = f"d_ff {m['d_ff']} per expert"
        if m["shared_d_ff"] is not None:
            widths += f" and {m['shared_d_ff']} shared"
        rows += [
            ("layers", layers),
            ("widths", f"d_model {m['d_model']}, {widths}, vocabulary {m['vocab_size']}"),
            ("attention", f"{heads}, context {m['context_length']}" + _window_text(m["sliding_window"])),
            ("KV cache", f"{report['kv_type']} by default, {format_bytes(report['kv_bytes_per_token'])} a token"),
            ("experts", "none" if e is None else _experts_text(e)),
            ("dense weights", format_bytes(report["dense_bytes"])),
            ("texts end at", _ends_text(gguf, report["tokenizer"]["ends"])),
            ("a token uses", "the dense weights" if e is None else _use_text(e)),
        ]
    types = report["tensor_types"].items()
    t = report["tokenizer"]
    rows += [
        ("types", ", ".join(f"{name} {format_bytes(part['bytes'])} ({part['tensors']})" for name, part in types)),
        ("tokenizer", f"{t['model']} ({t['pre'] or 'no pre-tokenizer named'}), {t['tokens']} tokens"),
        ("chat template", "yes" if report["chat_template"] else "no"),
        ("read", "; ".join(sorted({_io_text(mode) for mode in report["io"]}))),
        ("kernels", report["kernels"]),
        ("device", f"{report['device']['label']} ({report['device']['reason']})"),
        ("can be run", "yes" if report["runnable"] else f"no: {report['why_not']}"),
    ]
    for name, value in rows:
        print(f"{name:<14} {one_line(str(value))}")
    for tensor in report.get("tensors", ()):
        shape = " x ".join(map(str, tensor["shape"]))
        where = f"{tensor['bytes']} bytes at {tensor['offset']} of file {tensor['file']}"
        print(one_line(f"{tensor['name']:<32} {tensor['type']:<5} {shape:<20} {where}"))


def _ends_text(gguf: GGUFFile, ends: list[int]) -> str:
    tokens = gguf.get_strings("tokenizer.ggml.tokens")
    shown = ", ".join(f"{i} {_shortened(tokens[i])}" for i in ends[:_SHOWN_ENDS])
    return (shown or "no token") + (f" and {len(ends) - _SHOWN_ENDS} more" if len(ends) > _SHOWN_ENDS else "")


def _experts_text(experts: dict[str, Any]) -> str:
    each = format_bytes(experts["largest_bytes"])
    return f"{format_bytes(experts['bytes'])} in all, up to {each} each, named {experts['naming']}"


def _use_text(experts: dict[str, Any]) -> str:
    return f"{format_bytes(experts['bytes_per_token'])} of experts and the dense weights"


def _window_text(window: int | None) -> str:
    return "" if window is None else f", window {window}"


def _io_text(mode: dict[str, Any]) -> str:
    how = f"directly, aligned to {mode['alignment']} bytes" if mode["direct"] else "through the page cache"
    return f"{how} ({mode['reason']})"
